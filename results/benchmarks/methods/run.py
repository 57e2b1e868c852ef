"""Every method of the library at its representative formats: held-out layer error, whole-model KL and perplexity, time and memory.

One calibration sweep over the dense model makes every (method, format) of a block, so that statistics are collected once; then each
row is installed and evaluated. With --in-order each row has a sweep of its own, in which a block is calibrated behind the compressed
blocks before it. Rows that are in rows.jsonl are skipped, finished blocks of a sweep that was cut off are not repeated.
"""

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from rows import Row, chosen_rows
from table import write_table
from torch import Tensor

from methods import catalogue
from methods.apply import Installer, site_view
from methods.atomic import write_text
from methods.bank import Bank
from methods.calibrate import sweep
from methods.catalogue import METHODS
from methods.formats.numerics import payload_bits
from methods.method import Edit, Stats
from methods.model.blocks import BlockRunner
from methods.model.load import LoadedModel, load
from methods.model.structure import Site, Structure
from search.config import default_cache
from search.data import tokenize, tokens_hash
from search.documents import read_documents
from search.evaluate import Evaluator, Switch
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
    """One model, one calibration text, one evaluation text."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded: LoadedModel = load(None if options.model == "default" else options.model, options.cache, log=say)
        self.calibrate = self._text(options.calibrate, -(-options.tokens // options.sequence))
        self.evaluate = self._text(options.evaluate, options.windows)
        self.key = content_key(self.loaded.digest, tokens_hash(self.calibrate), tokens_hash(self.evaluate), catalogue.REVISION)
        folder = options.scratch / self.key / ("in-order" if options.in_order else "dense")
        self.bank, self._facts = Bank(folder / "bank"), folder / "facts"
        blocks = self.structure.blocks
        self.measured = options.sites or sorted({0, len(blocks) // 2, len(blocks) - 1})

    @property
    def structure(self) -> Structure:
        return self.loaded.structure

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
            site.name: catalogue.needs(d for row in rows if (d := row.at(site)) is not None) for site in self.structure.sites
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
        at = {site.name: row.at(site) for site in self.structure.in_block(block)}
        return {name: edit for name, d in at.items() if d is not None and (edit := self.bank.get(name, d)) is not None}

    def _make(self, row: Row, block: int, stats: Mapping[str, Stats], made: Made) -> dict[str, Edit]:
        sites = {site.name: site for site in self.structure.in_block(block) if row.at(site) is not None}
        decisions = {name: decision for name, site in sites.items() if (decision := row.at(site)) is not None}
        views = [site_view(self.loaded.model, self.structure, site) for site in sites.values()]
        with peak_memory() as peak:
            began = time.process_time()
            edits = catalogue.apply_block(views, stats, decisions, {})
            made.seconds += time.process_time() - began
            made.peak_mib = max(made.peak_mib, peak())
        for name, edit in edits.items():
            made.n_own += decisions[name] == row.decision
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
        switch = Switch(self.loaded.model, self.structure, self.bank.get)
        evaluator = Evaluator(switch, self.evaluate)
        for index, row in enumerate(rows):
            began = time.monotonic()
            at = {site.name: decision for site in self.structure.sites if (decision := row.at(site)) is not None}
            quality = None
            if not self.options.errors_only:
                quality = evaluator.evaluate_edits({site: self.bank.get(site, decision) for site, decision in at.items()})
            made = self.made(row)
            record(
                {
                    "method": row.method,
                    "format": row.format,
                    "in_order": self.options.in_order,
                    "key": self.key,
                    "command": _shown(sys.argv[1:]),
                    "family": METHODS[row.recipe].family,
                    "simulated": METHODS[row.recipe].simulated,
                    "sites": made.n_own,
                    "plain_sites": made.n_sites - made.n_own,
                    "all_sites": len(self.structure.sites),
                    "bits": made.bits / made.weights,
                    "errors": self._by_kind(made.errors),
                    "kl": quality and quality.kl,
                    "kl_stderr": quality and quality.kl_stderr,
                    "perplexity": quality and quality.perplexity,
                    "cpu_seconds": made.seconds,
                    "blocks": len(made.blocks),
                    "peak_mib": made.peak_mib,
                }
            )
            told = f"KL {quality.kl:.4f}" if quality else "errors alone"
            say(f"{index + 1} of {len(rows)}: {row.method} {row.format}, {told}, {time.monotonic() - began:.0f} s")
        switch.dense()  # the next sweep starts from it

    def _by_kind(self, errors: Mapping[str, float]) -> dict[str, float]:
        """The geometric mean over the measured blocks, by kind of site."""
        kinds: dict[str, list[float]] = {}
        for name, error in errors.items():
            kinds.setdefault(self.structure.site(name).kind, []).append(error)
        return {kind: math.exp(sum(math.log(max(e, 1e-30)) for e in own) / len(own)) for kind, own in kinds.items()}

    def dense(self) -> dict[str, Any]:
        """The facts that all rows share."""
        evaluator = Evaluator(Switch(self.loaded.model, self.structure, self.bank.get), self.evaluate)
        return {
            "model": self.loaded.label,
            "digest": self.loaded.digest,
            "notes": list(self.loaded.notes),
            "calibration": f"{self.calibrate.numel()} tokens of {Path(self.options.calibrate).name}",
            "evaluation": f"{len(self.evaluate)} windows of {self.evaluate.shape[1]} tokens of {Path(self.options.evaluate).name}",
            "dense_perplexity": evaluator.evaluate_edits({}).perplexity,
            "blocks": self.measured,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }


def _shown(arguments: Sequence[str]) -> str:
    """The command, with files by name alone and without the places of its own: where things lie is the machine's business."""
    kept: list[str] = []
    waiting = iter(arguments)
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


def main() -> None:
    """See the module."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate", required=True, metavar="TEXT", help="calibration text: a file or folder")
    parser.add_argument("--evaluate", required=True, metavar="TEXT", help="held-out text")
    parser.add_argument("--model", default="default", help="as `search run --model`")
    parser.add_argument("--methods", type=_list, default=[], help="NAME or NAME:KNOB=VALUE:…, comma separated; default: all")
    parser.add_argument(
        "--formats", type=_list, default=[], help="comma separated; default: representative ones of each method"
    )
    parser.add_argument("--sites", type=_blocks, default=[], metavar="B,B,…", help="blocks whose sites' errors are measured")
    parser.add_argument("--errors-only", action="store_true", help="compress the measured blocks alone, and no whole model")
    parser.add_argument("--in-order", action="store_true", help="calibrate each block behind the compressed ones before it")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a sequence and of a window")
    parser.add_argument("--windows", type=int, default=4, help="of evaluation")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--out", type=Path, default=here, help="folder of rows.jsonl, table.csv and README.md")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of converted models")
    parser.add_argument("--scratch", type=Path, default=default_cache() / "benchmark", help="compressed weights: ~60 MB a row")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = chosen_rows(options.methods, options.formats)
    benchmark = Benchmark(options)
    path = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(item["method"], item["format"], item["in_order"]) for item in known if item["key"] == benchmark.key}
    todo = [row for row in rows if (row.method, row.format, options.in_order) not in done]
    say(f"{len(todo)} of {len(rows)} rows to do")

    def record(item: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(item) + "\n")
        known.append(item)

    for together in [[row] for row in todo] if options.in_order else [todo] if todo else []:
        benchmark.make(together)
        benchmark.judge(together, record)
    own = [item for item in known if item["key"] == benchmark.key]
    commands = list(dict.fromkeys(item["command"] for item in own))
    write_table(options.out, own, {**benchmark.dense(), "commands": commands})


def _list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _blocks(text: str) -> list[int]:
    return [int(item) for item in _list(text)]


if __name__ == "__main__":
    main()
