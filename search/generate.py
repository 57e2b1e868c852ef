"""What one does with an answer: write text on the real kernels, materialise a policy file, export."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods import checkpoint, policy_file
from methods.bank import Bank, DamagedEdit, MissingEdit
from methods.catalogue import REVISION, model_method
from methods.formats.numerics import payload_bits
from methods.formats.sides import plain
from methods.kv.format import CacheFormat
from methods.lift import Lifted
from methods.method import Edit
from methods.model.structure import Structure
from methods.model.tokenizer import check_ids
from methods.policy import Policy
from methods.recipes.cache import CacheMethod
from profilers.campaign import local
from profilers.cuda_timer import CudaDevice, Device, captured
from profilers.kernels.catalogue import supported
from profilers.kv_cache import new_cache
from profilers.runtime import KernelLinear, Runtime
from profilers.steps import FixedStep
from profilers.sweep import torch_threads
from profilers.table import LatencyTable
from profilers.target import Target
from search.config import ConfigError, RunConfig, default_cache
from search.files import check_new_folder, check_place, content_key, mended
from search.finalists import Judge
from search.fit import continuation_notes
from search.in_order import compress_in_order, needs_order, ordered_bank, stored
from search.progress import Progress
from search.results import BEST, Answer, measured_policy, saved_config, saved_prepared
from search.room import check_written
from search.session import Session
from search.transform import text_of


@dataclass(frozen=True)
class Generated:
    """Text and how fast it came: ms a token, the first one (prefill) left out; kernels: which ran how many sites.

    simulated: by reason, the sites that no kernel runs: they are decoded, and slow, and their inputs are not rounded; notes: what else
    a reader must know.
    """

    text: str
    n_tokens: int
    ms_per_token: float
    kernels: str
    simulated: Mapping[str, Sequence[str]]
    notes: Sequence[str] = ()


def generate(folder: Path, prompt: str, n_tokens: int, threads: int | None, on: str = "cpu") -> Generated:
    """Greedy continuation by a compressed checkpoint on this machine's kernels.

    on: `cpu` or `cuda`. Raises `CorruptCheckpoint` where the folder is none, ValueError for an empty prompt or a device that is not here.
    """
    target = local(on, threads)
    loaded = checkpoint.load_dense(folder)
    if loaded.tokenizer is None:
        raise ConfigError(f"{folder}: the model has no tokenizer, so it reads no prompt; add tokenizer.json to the folder")
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError("--prompt: empty; give some text to continue")
    check_ids(ids, loaded.model, loaded.tokenizer, "--prompt")
    check_written(loaded.structure, ids.numel(), n_tokens, target.dtype.itemsize)
    notes = continuation_notes(loaded, ids.shape[1], n_tokens)
    held = checkpoint.read(folder)
    table = LatencyTable.open(default_cache() / "tables", target)
    simulated = simulated_sites(loaded.structure, Lifted(held.edits, loaded.structure, loaded.model), target)
    dense = {site for sites in simulated.values() for site in sites}
    # The loaded model holds the decoded weights, so that a site without its edit runs them densely.
    edits = {site: edit for site, edit in held.edits.items() if site not in dense}
    model = Runtime(loaded.model, loaded.structure, target, table).materialize(edits)
    fmt = cache_format(policy_file.parse(held.policy_text, loaded.structure).policy, loaded.structure)
    found, seconds = [], []
    with torch.inference_mode(), torch_threads(target.threads):
        began = time.perf_counter()
        for token in continued(model, ids.to(target.device), n_tokens, fmt, cuda_device(target)):
            now = time.perf_counter()
            seconds.append(now - began)
            found.append(token)
            began = now
            if token == loaded.tokenizer.eos_token_id:
                break
    text = loaded.tokenizer.decode(found, skip_special_tokens=True)
    later = sorted(seconds[1:]) or seconds
    return Generated(text, len(found), later[len(later) // 2] * 1e3, _kernels(model), simulated, notes)


def cuda_device(target: Target) -> Device | None:
    """What captures graphs on the target, None on a CPU."""
    return CudaDevice(target) if target.device == "cuda" else None


def continued(
    model: Any, ids: Tensor, n_tokens: int, fmt: CacheFormat | None = None, device: Device | None = None
) -> Iterator[int]:
    """Greedy tokens behind a prompt (1, tokens), each as soon as it is there; run in inference mode.

    fmt: of the key/value cache; device: what captures the decode step in a graph, which is replayed for every token (a cache in another
    format than the model's own grows, and its steps are launched one by one).
    """
    if device is not None and fmt is None:
        yield from _replayed(model, ids, n_tokens, device)
        return
    cache, step = new_cache(model, fmt), ids
    for _ in range(n_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield int(step)


def _replayed(model: Any, ids: Tensor, n_tokens: int, device: Device) -> Iterator[int]:
    step = FixedStep(model, ids, ids.shape[1] + n_tokens)
    yield int(step.token)
    if n_tokens > 1:
        run, _, _ = captured(step, device)
        for _ in range(n_tokens - 1):
            run()
            step.advance()
            yield int(step.token)


def simulated_sites(structure: Structure, edits: Mapping[str, Edit], target: Target) -> dict[str, list[str]]:
    """The sites whose payload no kernel runs on the target, by the reason: parts beside the grid, or the format.

    edits: as they run (`methods.lift`).
    """
    found: dict[str, list[str]] = {}
    for name, edit in edits.items():
        site = structure.site(name)
        for layer in site.layers:
            if layer.name not in edit.linears:
                continue
            compressed = edit.linears[layer.name]
            n = site.d_out if site.shares_input else layer.d_out
            if not plain(compressed.payload):
                beside = {part.partition(".")[0].rstrip("0123456789") for part in compressed.payload if "." in part}
                reason = f"{', '.join(sorted(beside))} beside the grid"
            elif not supported(compressed.format, n, layer.d_in, 1, target):
                reason = f"no kernel for {compressed.format.name}"
            else:
                continue
            found.setdefault(reason, []).append(name)
            break
    return found


def _kernels(model: torch.nn.Module) -> str:
    names = Counter(type(m.site.few).__name__ for m in model.modules() if isinstance(m, KernelLinear) and m.index == 0)
    return ", ".join(f"{count} {name}" for name, count in names.most_common())


def materialize(policy: Path, out: Path, config: RunConfig, study: Path | None, progress: Progress) -> None:
    """Turn a policy file into a checkpoint.

    With a study, the weights that it judged are used, bit for bit; otherwise sites are compressed here, calibrated on `config`'s text, and
    in order on the compressed prefix; blocks are kept in the cache until the checkpoint is written, and an interrupted call goes on from
    them. Simulated methods are as good as any here.
    """
    if not out.name:
        raise ConfigError(f"--out {str(out)!r}: name a folder to write")
    check_new_folder(out, "--out")
    if study is not None:
        saved = saved_config(study)
        config = replace(saved, cache=config.cache or saved.cache)
    else:
        # Nothing is searched or validated: a sequence of each, because the text is dealt out to all roles.
        config = replace(config, search_tokens=1, validation_tokens=1)
    if not policy.is_file():
        raise ConfigError(f"{policy}: no such file; give a policy, for example one of a study's policies/")
    session = Session(config, progress)
    for note in session.stored.notes:
        progress.say(note)
    file = policy_file.read(policy, session.stored.structure)
    cache_format(file.policy, session.stored.structure)
    transform = text_of([decision for decision in file.policy.model if model_method(decision.method).rotates])
    if study is None:
        session.config = replace(config, transform=transform)
    elif transform != text_of([config.transform_decision] if config.transform_decision else []):
        raise ConfigError(
            f"{study}: its --transform {config.transform} is not that of {policy}; leave --study out to compress here"
        )
    if study is not None:
        session.calibration = saved_prepared(study).data["calibrate"]["sha256"]
        try:
            checkpoint.write(out, session.loaded, file, _from_study(session, file))
        except (MissingEdit, DamagedEdit) as error:
            raise ConfigError(f"{config.folder}: {error.args[0]}; leave --study out to compress here") from None
        return
    mended(lambda: checkpoint.write(out, session.loaded, file, _compressed(session, file.policy)), progress.say)
    shutil.rmtree(_unfinished(session, file.policy), ignore_errors=True)


def cache_format(policy: Policy, structure: Structure) -> CacheFormat | None:
    """The key/value cache that a policy decides on, None for the model's own; raises ValueError where model or checkpoint refuse it."""
    found = [(m, dict(d.knobs)) for d in policy.model if isinstance(m := model_method(d.method), CacheMethod)]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"the policy decides on {len(found)} key/value caches; a model has one")
    method, knobs = found[0]
    reason = method.refuses(structure, knobs)
    fmt = method.cache_format(knobs)
    if reason is None and fmt.calibrated:
        reason = f"{method.name}: {fmt.name} needs a calibration, for which a checkpoint has no place; use one that needs none"
    if reason:
        raise ValueError(reason)
    return fmt


def _compressed(session: Session, policy: Policy) -> Mapping[str, Edit]:
    """The policy's edits made in order, with a line of progress for every block."""
    structure, progress = session.loaded.structure, session.progress
    began = time.monotonic()

    def finished(block: int, edits: Mapping[str, Edit]) -> None:
        bits = sum(payload_bits(c.format, c.payload) for edit in edits.values() for c in edit.linears.values())
        weights = sum(c.dense.numel() for edit in edits.values() for c in edit.linears.values())
        what = f"{len(edits)} sites, {bits / weights:.2f} bits a weight" if weights else "dense"
        progress.say(f"block {block + 1} of {len(structure.blocks)}: {what}, {time.monotonic() - began:.0f} s")

    folder = _unfinished(session, policy)
    return compress_in_order(session, policy, Bank(folder), "compressing", finished)


def _unfinished(session: Session, policy: Policy) -> Path:
    """Where finished blocks of a checkpoint lie until it is written, so that an interrupted command goes on from there."""
    text = session.calibration if needs_order(policy) else ""
    key = content_key(session.loaded.digest, text, policy.key(), session.config.seed, REVISION)
    return session.config.cache_folder / "materialized" / key


def _from_study(session: Session, file: policy_file.PolicyFile) -> Mapping[str, Edit]:
    sites = Policy(file.policy.sites)
    bank = ordered_bank(session, sites) if file.weights_algo.get("in_order") else session.bank
    return stored(session, sites, bank)


def _from_checkpoint(folder: Path, progress: Progress) -> Mapping[str, Edit] | None:
    """The edits of a study's checkpoint, None where there is none or it is damaged: its bank holds them too."""
    if not folder.exists():
        return None
    try:
        return checkpoint.read(folder).edits
    except checkpoint.CorruptCheckpoint as error:
        progress.say(f"{error}; the study's bank is used instead")
        return None


def export_study(
    folder: Path, answer: Answer, name: str, out: Path | None, progress: Progress, wanted: str = BEST
) -> tuple[Path, Any]:
    """Export a study's answer; returns the folder and what loading it back showed. Refuses what the format cannot express.

    Needs the study and its model, not the device that it was searched for.
    wanted: `best`, or another measured policy: its name, or its row in the table of `search show`, counted from 1.
    """
    from search.deliver import checkpoint_folder, export_answer, policy_file_of
    from search.export.standalone import sample_tokens
    from search.folder import check_model

    if out is not None:
        check_place(out, "--out", folder=True)
    source, item = measured_policy(folder, answer, wanted)
    session = Session(saved_config(folder), progress)
    prepared = saved_prepared(folder)
    check_model(session, prepared)
    session.calibration = prepared.data["calibrate"]["sha256"]
    place = checkpoint_folder(folder, item)
    path = out or folder / "exports" / name / place.name
    file = policy_file_of(session, prepared, item, source)
    try:
        edits = _from_checkpoint(place, progress) or Judge(session, prepared).edits(item)
        return path, export_answer(session, name, file, edits, path, out is None, sample_tokens(session.stored))
    except (MissingEdit, DamagedEdit) as error:
        raise ConfigError(f"{error.args[0]}; repeat the study's `search run`, which makes it again") from None
