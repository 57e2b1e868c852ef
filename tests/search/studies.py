"""A finished study on disk, made by hand: two sites, a dense model, a simple policy and a searched one that meets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods.policy import DENSE, Decision, Policy
from predictors.assumed import AssumedMap
from predictors.latency import Run, fit_latency
from predictors.loss import PredictorReport
from search.config import RunConfig, to_toml
from search.finalists import Finalist, Met
from search.prepared import Option, Prepared, SiteOptions, WorkloadCost
from search.results import Answer

DECODE = "decode:batch=1,context=8"
PREFILL = "prefill:batch=1,prompt=16"
W4 = Decision.of("gptq", format="w4a16-g32")
W8 = Decision.of("rtn", format="w8a16")


def prepared() -> Prepared:
    """A measured main workload, and another one whose map is assumed."""

    def site(name: str, block: int) -> SiteOptions:
        four = Option(W4.label, "w4a16-g32", 4.5, 450, 1.0, "k", 1.0, 0.1, 0.01)
        eight = Option(W8.label, "w8a16", 8.0, 800, 2.0, "k", 2.0, 0.02, 0.0)
        return SiteOptions(name, "down", block, 800, (Option(DENSE.label, "bf16", 16, 1600, 4.0, "d", 4.0), four, eight))

    ms = [(8.0, 10.1), (2.0, 4.0), (4.0, 6.2), (6.0, 7.9), (5.0, 7.1)]
    fitted = fit_latency([Run(f"p{i}", total, took, took * 0.98, took * 1.02) for i, (total, took) in enumerate(ms)])
    prefill = AssumedMap(10, 9, 11, 0.9, 1.2).to_dict()
    text = {"role": "report", "source": "t.txt", "sha256": "ab", "sequences": 2, "length": 32, "generated": False}
    return Prepared(
        sites=(site("0.down", 0), site("1.down", 1)),
        latency=fitted.to_dict(),
        dense_ms=(10.0, 9.8, 10.3),
        dense_name="dense bf16",
        other_bytes=1000,
        model={"label": "tiny", "digest": "0" * 16, "notes": ["a note"], "n_parameters": 1600},
        target={"name": "cpu", "description": "a box", "fingerprint": "f" * 16, "threads": 1},
        data={role: {**text, "role": role} for role in ("calibrate", "search", "validate", "report")},  # type: ignore[typeddict-item]
        notes=("another note",),
        seconds={"table": 1.0},
        tail=1.2,
        also=(WorkloadCost(PREFILL, ((20.0, 25.0, 22.0),) * 2, prefill, (50.0, 45.0, 60.0), 1.1, "checked"),),
        kv_bytes=500,
        workload=DECODE,
        checked="blocks agree",
    )


def answer() -> Answer:
    """Of a latency and a size."""
    mixed = Policy({"0.down": (W4,), "1.down": (W8,)})
    met = (Met("0.6x", 0.5, 0.48, 0.55, 0.6, "x", True), Met("size=1MB", 2250.0, 2250.0, 2250.0, 1e6, "bytes", True))
    numbers: dict[str, Any] = {
        "predicted_ms": 5.0,
        "meets": True,
        "size_bytes": 2250,
        "met": met,
        "kl_each": (0.1, 0.2),
        "kl": 0.15,
    }
    numbers |= {"report_kl": 0.16, "report_kl_stderr": 0.01, "perplexity": 20.0, "tasks": {"task": {"acc": 0.5}}}
    searched = Finalist("mix", mixed, False, 5.0, 4.8, 5.5, 0.5, 0.48, 0.55, **numbers)
    simple = replace(searched, name="uniform w4", policy=Policy.uniform(["0.down", "1.down"], W4), simple=True, report_kl=0.3)
    whole = {"latency_ms": 10.0, "lo_ms": 9.8, "hi_ms": 10.3, "ratio": 1.0, "report_kl": 0.0, "report_kl_stderr": 0.0}
    dense = replace(searched, name="dense", policy=Policy(), simple=True, meets=False, **whole)
    report = PredictorReport(8, 0.9, 0.8, None, 0, 0.1, 0.9, 0.9, ("affine",), ((0.1, 0.05, 0.2, 0.3),))
    return Answer(
        "0.6x,size=1MB",
        6.0,
        "met",
        (dense, searched, simple),
        1,
        2,
        (-0.14, 0.01),
        0.02,
        {"latency_ms": 5.0},
        report,
        {"policies": 3.0, "table time": 1.5},
        {"torch": "2", "threads": "1"},
        ("a note",),
    )


def save_study(folder: Path) -> Path:
    """The files of a finished study that the commands about it read."""
    config = RunConfig(latency="0.6x", size="1MB", workload=(DECODE, PREFILL), study=folder.name, results=str(folder.parent))
    write(folder / "config.toml", to_toml(config))
    write(folder / "steps" / "prepared.json", json.dumps({"key": "k", "value": prepared().to_json()}))
    write(folder / "answers" / "0.6x,size=1MB.json", json.dumps(answer().to_json()))
    return folder


def write(path: Path, text: str) -> None:
    """A file in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
