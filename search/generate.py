"""What one does with an answer: write text on the real kernels, materialise a policy file, export."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from methods import checkpoint, policy_file
from methods.method import Edit
from profilers.runtime import KernelLinear, Runtime
from profilers.sweep import torch_threads
from profilers.table import LatencyTable
from profilers.target import local_cpu
from search.config import ConfigError, RunConfig, default_cache
from search.in_order import compress_in_order, ordered_bank, stored
from search.prepared import Prepared
from search.progress import Progress
from search.results import Answer, saved_config
from search.session import Session


@dataclass(frozen=True)
class Generated:
    """Text and how fast it came: ms a token, the first one (prefill) left out; kernels: which ran how many sites."""

    text: str
    n_tokens: int
    ms_per_token: float
    kernels: str


def generate(folder: Path, prompt: str, n_tokens: int, threads: int | None) -> Generated:
    """Greedy continuation by a compressed checkpoint on this machine's kernels.

    Raises `CorruptCheckpoint` where the folder is none, ValueError for an empty prompt.
    """
    loaded = checkpoint.load_dense(folder)
    if loaded.tokenizer is None:
        raise ConfigError(f"{folder}: the model has no tokenizer, so it reads no prompt; add tokenizer.json to the folder")
    held = checkpoint.read(folder)
    target = local_cpu(threads)
    table = LatencyTable.open(default_cache() / "tables", target)
    model = Runtime(loaded.model, loaded.structure, target, table).materialize(held.edits)
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError("--prompt: empty; give some text to continue")
    found, seconds = [], []
    with torch.inference_mode(), torch_threads(target.threads):
        cache, step = None, ids
        for _ in range(n_tokens):
            began = time.perf_counter()
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
            found.append(int(step))
            if found[-1] == loaded.tokenizer.eos_token_id:
                break
    text = loaded.tokenizer.decode(found, skip_special_tokens=True)
    later = sorted(seconds[1:]) or seconds
    return Generated(text, len(found), later[len(later) // 2] * 1e3, _kernels(model))


def _kernels(model: torch.nn.Module) -> str:
    names = Counter(type(m.site.few).__name__ for m in model.modules() if isinstance(m, KernelLinear) and m.index == 0)
    return ", ".join(f"{count} {name}" for name, count in names.most_common())


def materialize(policy: Path, out: Path, config: RunConfig, study: Path | None, progress: Progress) -> None:
    """Turn a policy file into a checkpoint.

    With a study, the weights that it judged are used, bit for bit; otherwise sites are compressed here, calibrated on `config`'s text, and
    in order on the compressed prefix.
    """
    if study is not None:
        config = replace(saved_config(study), cache=config.cache)
    session = Session(config, progress)
    file = policy_file.read(policy, session.loaded.structure)
    edits = _from_study(session, file) if study is not None else compress_in_order(session, file.policy, None, "compressing")
    checkpoint.write(out, session.loaded, file, edits)


def _from_study(session: Session, file: policy_file.PolicyFile) -> dict[str, Edit]:
    bank = ordered_bank(session, file.policy) if file.weights_algo.get("in_order") else session.bank
    try:
        return stored(session, file.policy, bank)
    except KeyError as error:
        raise ConfigError(f"{session.config.folder}: {error.args[0]}; leave --study out to compress here") from None


def _prepared(folder: Path) -> Prepared:
    return Prepared.from_json(json.loads((folder / "steps" / "prepared.json").read_text())["value"])


def export_study(folder: Path, answer: Answer, name: str, out: Path | None, progress: Progress) -> tuple[Path, Any]:
    """Export a study's answer; returns the folder and what loading it back showed. Refuses what the format cannot express."""
    from search.deliver import checkpoint_folder, export_answer, policy_file_of
    from search.run import check_same

    if answer.best is None:
        raise ConfigError(f"{folder}: no policy met {answer.objective}; there is nothing to export")
    config = replace(saved_config(folder), study=folder.name, results=str(folder.parent))
    session = Session(config, progress)
    prepared = _prepared(folder)
    check_same(session, prepared)
    held = checkpoint.read(checkpoint_folder(folder, answer))
    path = out or folder / "exports" / name / checkpoint_folder(folder, answer).name
    file = policy_file_of(session, prepared, answer.best, answer)
    return path, export_answer(session, name, file, held.edits, path, required=True)
