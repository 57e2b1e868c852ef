"""One model, one calibration text, one evaluation text: rows made, judged and kept."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rows import Row
from torch import Tensor

from methods import catalogue
from methods.apply import Installer, site_view
from methods.atomic import write_text
from methods.bank import Bank
from methods.calibrate import sweep
from methods.catalogue import METHODS
from methods.formats.format import parse_format
from methods.formats.numerics import payload_bits
from methods.method import Edit, Stats
from methods.model.blocks import BlockRunner
from methods.model.load import LoadedModel, load
from methods.model.structure import Site, Structure
from methods.policy import Decision
from methods.quant.format_choice import decide_mofq
from search.data import tokenize, tokens_hash
from search.documents import read_documents
from search.evaluate import Evaluator, Quality, Switch
from search.files import content_key


@dataclass
class Made:
    """What making one row took and gave, over the sites so far: CPU seconds, and MiB above what was in use (nan where unknown)."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    n_own: int = 0
    n_sites: int = 0
    bits: float = 0.0
    weights: int = 0
    blocks: list[int] = field(default_factory=list)


class Benchmark:
    """One model, one calibration text, one evaluation text.

    before: what was done once, to the model as a whole, before anything at its sites; no row is without it.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded = self._load()
        self.calibrate = self._text(options.calibrate, -(-options.tokens // options.sequence))
        self.evaluate = self._text(options.evaluate, options.windows)
        self.key = content_key(self.loaded.digest, tokens_hash(self.calibrate), tokens_hash(self.evaluate), catalogue.REVISION)
        blocks = self.structure.blocks
        self.measured = options.sites or sorted({0, len(blocks) // 2, len(blocks) - 1})
        self.before = Made()
        self._keep_in("")

    def _load(self) -> LoadedModel:
        return load(None if self.options.model == "default" else self.options.model, self.options.cache, log=say)

    def _keep_in(self, name: str) -> None:
        """Where compressed weights and what making them took are kept; name: of what was done to the whole model, "" for nothing."""
        self.folder: Path = self.options.scratch / self.key / name / ("in-order" if self.options.in_order else "dense")
        self.bank, self._facts = Bank(self.folder / "bank"), Path(self.folder, "facts")
        self._chosen: dict[tuple[Row, str], Decision] = {}

    @property
    def structure(self) -> Structure:
        return self.loaded.structure

    def at(self, row: Row, site: Site) -> Decision | None:
        """The decision of a row at a site, or None where it stays dense; where weights decide on the format, on those that are there."""
        if row.kind != "mofq":
            return row.at(site)
        if not parse_format(row.format).divides(site.d_in):
            return None
        if (row, site.name) not in self._chosen:
            self._chosen[row, site.name] = decide_mofq(site_view(self.loaded.model, self.structure, site), row.format)
        return self._chosen[row, site.name]

    def _text(self, source: str, n_sequences: int) -> Tensor:
        return tokenize(read_documents(source), self.loaded.tokenizer, n_sequences, self.options.sequence)

    def made(self, row: Row) -> Made:
        """What an earlier, unfinished run made of a row."""
        path = self._path(row)
        return Made(**json.loads(path.read_text())) if path.exists() else Made()

    def _path(self, row: Row) -> Path:
        return self._facts / f"{content_key(row.method, row.format, self.measured)}.json"

    def make(self, rows: Sequence[Row]) -> None:
        """Compressed weights of all rows into the bank, and what that took."""
        made = {row: self.made(row) for row in rows}
        needs = {
            site.name: catalogue.needs(d for row in rows if row.kind != "mofq" and (d := row.at(site)) is not None)
            for site in self.structure.sites
        }
        n_blocks = len(self.structure.blocks)
        held_out = self._held_out()
        began = time.monotonic()

        def visit(block: int, stats: Mapping[str, Stats]) -> Mapping[str, Edit] | None:
            dense: dict[str, Tensor] = {}
            for row in rows:
                if block not in made[row].blocks:
                    edits = self._make(row, block, stats, made[row])
                    if block in held_out:
                        made[row].errors.update(self._errors(edits, held_out[block], dense))
                    made[row].blocks.append(block)
                    write_text(self._path(row), json.dumps(asdict(made[row])))
            say(f"block {block + 1} of {n_blocks}, {time.monotonic() - began:.0f} s")
            return self._edits(rows[0], block) if self.options.in_order else None

        batches = [self.calibrate[i : i + 1] for i in range(len(self.calibrate))]
        done = {block for block in range(n_blocks) if all(block in own.blocks for own in made.values())}
        if self.options.errors_only:
            done |= set(range(n_blocks)) - set(self.measured)
        if len(done) < n_blocks:
            ordered = self.options.in_order
            skip = (lambda block: False) if ordered else done.__contains__
            sweep(self.loaded.model, self.structure, batches, needs, visit, skip=skip, dense=not ordered)

    def _edits(self, row: Row, block: int) -> dict[str, Edit]:
        at = {site.name: self.at(row, site) for site in self.structure.in_block(block)}
        return {name: edit for name, d in at.items() if d is not None and (edit := self.bank.get(name, d)) is not None}

    def _make(self, row: Row, block: int, stats: Mapping[str, Stats], made: Made) -> dict[str, Edit]:
        with peak_memory() as peak:
            began = time.process_time()
            here = {site: self.at(row, site) for site in self.structure.in_block(block)}
            sites = {site.name: site for site, decision in here.items() if decision is not None}
            decisions = {site.name: decision for site, decision in here.items() if decision is not None}
            views = [site_view(self.loaded.model, self.structure, site) for site in sites.values()]
            edits = catalogue.apply_block(views, stats, decisions, {})
            made.seconds += time.process_time() - began
            made.peak_mib = max(made.peak_mib, peak())
        for name, edit in edits.items():
            made.n_own += row.kind == "mofq" or decisions[name] == row.decision
            made.n_sites += 1
            made.bits += sum(payload_bits(c.format, c.payload) for c in edit.linears.values())
            made.weights += sites[name].n_weights
            self.bank.put(name, decisions[name], edit)
        return edits

    def _errors(self, edits: Mapping[str, Edit], hidden: Sequence[Tensor], dense: dict[str, Tensor]) -> dict[str, float]:
        """The relative error of every edited site's outputs, nothing else edited; dense: outputs without edits, filled as needed."""
        errors = {}
        for name, edit in edits.items():
            site = self.structure.site(name)
            if name not in dense:
                dense[name] = self._outputs(site, None, hidden)
            energy = dense[name].square().sum()
            errors[name] = float((self._outputs(site, edit, hidden) - dense[name]).square().sum() / energy)
        return errors

    def _held_out(self) -> dict[int, list[Tensor]]:
        """What the measured blocks read of the evaluation text in the dense model."""
        self._runner = BlockRunner(
            self.loaded.model, self.structure, [self.evaluate[i : i + 1] for i in range(len(self.evaluate))]
        )
        hidden, found = self._runner.inputs(), {}
        for block in range(max(self.measured) + 1):
            if block in self.measured:
                found[block] = hidden
            hidden = [self._runner.run(block, h) for h in hidden]
        return found

    def _outputs(self, site: Site, edit: Edit | None, hidden: Sequence[Tensor]) -> Tensor:
        """Everything that the site's linears put out on the held-out text, with the edit installed: one long fp64 vector."""
        found: list[Tensor] = []
        handles = [
            self.loaded.model.get_submodule(layer.name).register_forward_hook(
                lambda _module, _args, output: found.append(output.double().flatten())
            )
            for layer in site.layers
        ]
        try:
            with Installer(self.loaded.model, self.structure) as installer:
                installer.install(site.name, edit)
                for h in hidden:
                    self._runner.run(site.block, h)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(found)

    def judge(self, rows: Sequence[Row], record: Callable[[dict[str, Any]], None]) -> None:
        """Whole-model quality of every row, from the bank."""
        for index, row in enumerate(rows):
            began = time.monotonic()
            at = {site.name: decision for site in self.structure.sites if (decision := self.at(row, site)) is not None}
            quality = None
            if not self.options.errors_only:
                quality = self.quality({site: self.bank.get(site, decision) for site, decision in at.items()})
            made = self.made(row)
            record(
                {
                    "method": row.method,
                    "format": row.format,
                    "in_order": self.options.in_order,
                    "key": self.key,
                    "command": shown(),
                    "family": row.family,
                    "simulated": METHODS[row.recipe].simulated,
                    "sites": made.n_own,
                    "plain_sites": made.n_sites - made.n_own,
                    "all_sites": len(self.structure.sites),
                    "bits": made.bits / made.weights,
                    "errors": self._by_kind(made.errors),
                    "kl": quality and quality.kl,
                    "kl_stderr": quality and quality.kl_stderr,
                    "perplexity": quality and quality.perplexity,
                    "cpu_seconds": self.before.seconds + made.seconds,
                    "blocks": len(made.blocks),
                    "peak_mib": max(self.before.peak_mib, made.peak_mib),
                }
            )
            told = f"KL {quality.kl:.4f}" if quality else "errors alone"
            say(f"{index + 1} of {len(rows)}: {row.method} {row.format}, {told}, {time.monotonic() - began:.0f} s")

    def quality(self, edits: Mapping[str, Edit]) -> Quality:
        """That of the model with the edits, from the dense one; the model is dense again afterwards."""
        found = self.evaluator.evaluate_edits(edits)
        self.switch.dense()
        return found

    @cached_property
    def switch(self) -> Switch:
        """Of the model."""
        return Switch(self.loaded.model, self.structure, self.bank.get)

    @cached_property
    def evaluator(self) -> Evaluator:
        """On the evaluation text, from the dense model."""
        return Evaluator(self.switch, self.evaluate)

    def _by_kind(self, errors: Mapping[str, float]) -> dict[str, float]:
        """The geometric mean over the measured blocks, by kind of site."""
        kinds: dict[str, list[float]] = {}
        for name, error in errors.items():
            kinds.setdefault(self.structure.site(name).kind, []).append(error)
        return {kind: math.exp(sum(math.log(max(e, 1e-30)) for e in own) / len(own)) for kind, own in kinds.items()}

    def dense(self) -> dict[str, Any]:
        """The facts that all rows share."""
        return {
            "model": self.loaded.label,
            "digest": self.loaded.digest,
            "notes": list(self.loaded.notes),
            "calibration": f"{self.calibrate.numel()} tokens of {Path(self.options.calibrate).name}",
            "evaluation": f"{len(self.evaluate)} windows of {self.evaluate.shape[1]} tokens of {Path(self.options.evaluate).name}",
            "dense_perplexity": self.quality({}).perplexity,
            "blocks": self.measured,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }


def shown() -> str:
    """The command of this process, files by name alone and without places of its own: where things lie is the machine's business."""
    kept: list[str] = []
    waiting = iter(sys.argv[1:])
    for argument in waiting:
        if argument in ("--out", "--cache", "--scratch"):
            next(waiting, None)
        else:
            kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
    return "python results/benchmarks/methods/run.py " + " ".join(kept)


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """A function that gives the MiB by which the process grew inside at most; nan where the system does not tell (glibc on Linux does)."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(reset, os.W_OK) or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        yield lambda: math.nan
        return
    # What was freed before must not hide what is needed now.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _kib(status, "VmRSS")
    yield lambda: max(0, _kib(status, "VmHWM") - before) / 1024


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
