"""GGUF files: converted once into a cached safetensors folder, off any low-bit grid that they lie on."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from methods.atomic import broken_seal, set_aside, sha256
from methods.model.baseline import FLOATS, Grid, bits_of, detect_grids, leave_grid_
from methods.model.describe import describe
from methods.model.experts import unfuse_experts
from methods.model.gguf_head import tie_again_
from methods.model.gguf_header import Header, UnreadableGGUF, first_line, read_header
from methods.model.gguf_metadata import Description, check_tensors, read_description
from methods.model.gguf_rope import check_rope
from methods.model.gguf_tokenizer import follow_
from methods.model.quiet import quiet
from methods.model.save import save
from methods.model.structure import Structure
from methods.model.weights import digest_of, not_finite

__all__ = ["ORIGIN", "RECIPE", "UnreadableGGUF", "as_stored", "convert", "label"]

RECIPE = "v2"
"""Changes whenever the conversion does, so that no old cache is mistaken for a new one."""

ORIGIN = "origin.json"
"""Beside a converted model: `label`, `notes` and the `digest` of its weights."""

DTYPES = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class _Read:
    """A model as the file describes it, fp32; kinds: the type of each parameter in the file, fused experts by their fused name."""

    model: Any
    tokenizer: Any
    kinds: Mapping[str, str]


def convert(path: Path, cache: Path, log: Callable[[str], None]) -> Path:
    """The safetensors folder of a GGUF file, under `cache/models`, made on the first call (tens of seconds), whole or not at all.

    Where a linear lies on a grid of at most 8 bits, all are moved off theirs (see `methods.model.baseline`) and stored in bf16;
    `origin.json` says so. Raises UnreadableGGUF for corrupt files, those without a tokenizer, and those whose metadata or tensors
    are not understood whole: what is converted computes what the file describes.
    """
    folder = cache / "models" / f"{sha256(path)[:16]}-{RECIPE}"
    if (folder / ORIGIN).exists():
        problem = broken_seal(folder)
        if not problem:
            return folder
        log(f"{folder} is damaged ({problem}): it is converted again")
        with contextlib.suppress(FileNotFoundError):  # another process may have been first here too
            shutil.rmtree(set_aside(folder))
    with _parsed_once():
        header = read_header(path)
        description = read_description(header)
        log(f"converting {path.name} to {folder} (once)")
        with quiet():
            read = _read(header, description)
    with quiet():
        damaged = not_finite(read.model)
        if damaged:
            raise UnreadableGGUF(f"{path}: {damaged} holds NaN or infinite values; the file is damaged, use another")
        tied = tie_again_(read.model, header)
        unfuse_experts(read.model)
        structure = describe(read.model)
        kinds = _by_linear(read, structure)
        notes = [*([tied] if tied else []), *_off_grid(read.model, structure, kinds), *follow_(read.tokenizer, header)]
        weights = _weights(structure, kinds)
        dtype = "bf16" if set(weights) - FLOATS else DTYPES[weights.most_common(1)[0][0]]
        origin = {"label": label(header, weights), "notes": notes, "digest": digest_of(read.model, dtype)}
        try:
            save(read.model, read.tokenizer, folder, dtype, {ORIGIN: json.dumps(origin, indent=2) + "\n"})
        except OSError:
            # Another process converting the same file may have been first; its folder is as good.
            if not (folder / ORIGIN).exists():
                raise
    return folder


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, a file's header is parsed once and an architecture's table of names made once, however often transformers asks for them.

    It asks for the header of every reader (seconds, with a vocabulary in Python strings) and for the table at every module of the model.
    """
    import gguf

    once = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, own in once.items():
            setattr(gguf, name, functools.cache(own))
        yield
    finally:
        for name, own in once.items():
            setattr(gguf, name, own)


def as_stored(path: Path) -> Any:
    """The model that a GGUF describes, fp32, with the weights that its tensors decode to: for comparison, where `convert` is for a search.

    Raises UnreadableGGUF as `convert` does.
    """
    with quiet(), _parsed_once():
        header = read_header(path)
        return _read(header, read_description(header)).model


def gguf_configuration(path: Path) -> tuple[Any, str]:
    """Configuration of transformers and weight dtype of a GGUF file, from its header alone; raises UnreadableGGUF as `convert` does."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    header = read_header(path)
    description = read_description(header)
    try:
        with quiet():
            config = AutoConfig.for_model(**description.settings)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UnreadableGGUF(
            f"{path}: transformers cannot read this GGUF as a causal language model ({first_line(error)})"
        ) from error
    kinds = Counter(tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1)
    return config, "bf16" if not kinds or set(kinds) - FLOATS else DTYPES[kinds.most_common(1)[0][0]]


def _off_grid(model: Any, structure: Structure, kinds: Mapping[str, str]) -> list[str]:
    grids = detect_grids(model, structure, kinds)
    if not grids:
        return []
    failed = leave_grid_(model, structure)
    return [
        f"of the linears' weights {_shares(grids)}, which formats of as many bits could reproduce without loss; channels were permuted and "
        "value heads rotated (the same function, seed 0) so that no result is flattered, and losses are against this model, not against "
        "the original weights",
        *failed,
    ]


def _shares(grids: tuple[Grid, ...]) -> str:
    """`21% lie on a grid of 4 bits (Q4_K), 79% on a grid of 5 bits (Q5_0)`."""
    parts = [f"{grid.share:.0%} {{}}on a grid of {grid.bits} bits ({', '.join(grid.kinds)})" for grid in grids]
    return ", ".join(part.format("" if index else "lie ") for index, part in enumerate(parts))


def _weights(structure: Structure, kinds: Mapping[str, str]) -> Counter[str]:
    """Weights of the linears by the type that the file holds them in."""
    counts: Counter[str] = Counter()
    for _, layer in structure.layers():
        counts[kinds[layer.name]] += layer.d_in * layer.d_out
    return counts


def label(header: Header, weights: Counter[str]) -> str:
    """The file's name without its type, and what the linears were stored in unless that is a float type."""
    name = re.sub(r"[.-](I?Q\d|TQ\d|MXFP4|NVFP4|BF16|F16|F32)\w*$", "", header.path.stem, flags=re.IGNORECASE)
    if not set(weights) - FLOATS:
        return name
    return f"{name}, dequantised from {_file_type(header, weights) or '+'.join(kind for kind, _ in weights.most_common())}"


def _file_type(header: Header, weights: Counter[str]) -> str | None:
    """The mix that the file says it is (`Q4_K_M`), None where its linears are not that: the type that gives the mix its name must occur."""
    from gguf import LlamaFileType

    try:
        name = LlamaFileType(header.metadata.get("general.file_type", -1)).name.removeprefix("MOSTLY_")
    except ValueError:
        return None
    if name in weights:
        return name if weights.most_common(1)[0][0] == name and name not in FLOATS else None
    family = name.split("_")[0] if name.startswith("IQ") else name.rsplit("_", 1)[0]
    return name if any(kind.startswith(family) for kind in weights if kind not in FLOATS) else None


def _by_linear(read: _Read, structure: Structure) -> dict[str, str]:
    """The type of each linear in the file, by its name; the experts of a layer are one tensor there."""
    names = {layer.name: re.sub(r"\.experts\.\d+\.", ".experts.", layer.name) for _, layer in structure.layers()}
    return {name: read.kinds.get(f"{stored}.weight") or read.kinds[stored] for name, stored in names.items()}


def _read(header: Header, description: Description) -> _Read:
    """The model with all tensors of the file, random generator untouched, and the tokenizer.

    Takes transformers' reader of GGUF tensors rather than `from_pretrained`, which wants a further package, leaves a quantizer on the
    model that then refuses to be saved, and reads a few keys of the metadata only. Raises UnreadableGGUF.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = header.path
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    try:
        config = AutoConfig.for_model(**description.settings)
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        parameters = _parameters(model, header)
        check_tensors(header, parameters)
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(**place)
        lost = _fill(model, read["tensors"])
    except UnreadableGGUF:
        raise
    except (ValueError, KeyError, TypeError, NotImplementedError, RuntimeError, OSError, StrictDataclassError) as error:
        raise UnreadableGGUF(
            f"{path}: transformers cannot read this GGUF as a causal language model ({first_line(error)})"
        ) from error
    if lost:
        raise UnreadableGGUF(f"{path}: weights for {', '.join(lost[:3])} are missing from the GGUF, {len(lost)} in all")
    check_rope(header, model, description.ropes)
    # Of two tensors in one parameter, as gate and up of fused experts are, the coarser type counts.
    finest_first = sorted(parameters, key=lambda name: -bits_of(header.tensors[name].kind))
    kinds = {parameters[name]: header.tensors[name].kind for name in finest_first}
    return _Read(model.eval().requires_grad_(False), tokenizer, kinds)


def _parameters(model: Any, header: Header) -> dict[str, str]:
    """The parameter that transformers' reader puts a tensor of the file into, by the tensor's name; others have no place."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    places = get_gguf_hf_weights_map(model, processor())
    # Fused experts stand in the reader's map without the suffix.
    found = {name: places.get(name) or places.get(name.removesuffix(".weight")) for name in header.tensors}
    return {name: parameter for name, parameter in found.items() if parameter}


def _fill(model: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Loads the tensors; names of those that nothing filled, a tied head counting as filled. RuntimeError for a wrong shape."""
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    model.tie_weights()
    state = model.state_dict()
    filled = {state[name].data_ptr() for name in tensors if name in state}
    return [name for name in missing if state[name].data_ptr() not in filled]
