"""Every method of the library at its representative formats: held-out layer error, whole-model KL and perplexity, time and memory.

One calibration sweep over the dense model makes every (method, format) of a block, so that statistics are collected once; then each
row is installed and evaluated. Rotations of the whole model (`quarot+gptq`) have a model and a sweep of their own; `mofq` takes at each
site integers or minifloats; of caches (`kv-cache`) the formats are `kv-…`.

With --in-order each row has a sweep of its own, in which a block is calibrated behind the compressed
blocks before it. Rows that are in rows.jsonl are skipped, finished blocks of a sweep that was cut off are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from benchmark import Benchmark, say
from rows import Row, chosen_rows
from table import write_table
from whole import Rotated, judge_caches

from methods.policy import Decision
from search.config import default_cache


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
    todo = [row for row in rows if (row.method, row.format, options.in_order and row.kind != "cache") not in done]
    say(f"{len(todo)} of {len(rows)} rows to do")

    def record(item: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(item) + "\n")
        known.append(item)

    _run(benchmark, [row for row in todo if row.kind in ("sites", "mofq")], record)
    rotated: dict[Decision, list[Row]] = {}
    for row in todo:
        if row.kind == "rotated" and row.whole is not None:
            rotated.setdefault(row.whole, []).append(row)
    for decision, after in rotated.items():
        _run(Rotated(benchmark, decision), after, record)
    caches = [row for row in todo if row.kind == "cache"]
    if caches and options.errors_only:
        say(f"{len(caches)} rows of caches left out: they have no site whose error could be measured alone")
    elif caches:
        judge_caches(benchmark, caches, record)
    own = [item for item in known if item["key"] == benchmark.key]
    commands = list(dict.fromkeys(item["command"] for item in own))
    write_table(options.out, own, {**benchmark.dense(), "commands": commands})


def _run(benchmark: Benchmark, rows: Sequence[Row], record: Callable[[dict[str, Any]], None]) -> None:
    """Makes and judges rows of one model: together, or each with a sweep of its own."""
    for together in [[row] for row in rows] if benchmark.options.in_order else [rows] if rows else []:
        benchmark.make(together)
        benchmark.judge(together, record)


def _list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _blocks(text: str) -> list[int]:
    return [int(item) for item in _list(text)]


if __name__ == "__main__":
    main()
