"""Rows of what is decided for the model as a whole: rotations with what follows at the sites, and key/value caches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmark import Benchmark, Made, peak_memory, say, shown
from rows import CHUNK, Row

from methods.atomic import write_text
from methods.kv.cache import attention_windows, new_cache
from methods.kv.calibrate import Calibration, calibrate
from methods.kv.format import CacheFormat, parse_cache_format
from methods.kv.quality import CacheQuality, evaluate
from methods.method import Edit
from methods.policy import Decision
from methods.recipes.cache import KV_CACHE
from search.evaluate import Quality, stderr
from search.files import content_key
from search.progress import Progress
from search.transform import transformed


class Rotated(Benchmark):
    """The benchmark with its model rotated, as `search run --transform` does it; KL is from the model as it is stored."""

    def __init__(self, base: Benchmark, decision: Decision) -> None:
        self._base, self.options, self.key = base, base.options, base.key
        self.calibrate, self.evaluate, self.measured = base.calibrate, base.evaluate, base.measured
        self.loaded = self._load()
        self._keep_in(content_key(decision.label))
        place = self.folder.parent
        path = place / "before.json"
        batches = [self.calibrate[i : i + 1] for i in range(len(self.calibrate))]
        with peak_memory() as peak:
            began = time.process_time()
            self.loaded = transformed(self.loaded, decision, batches, place, Progress(quiet=True))
            self.before = Made(time.process_time() - began, peak())
        # What was learned is taken from there when a run is continued: the time is that of the first one.
        if path.exists():
            self.before = Made(**json.loads(path.read_text()))
        place.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self.before)))

    def quality(self, edits: Mapping[str, Edit]) -> Quality:
        """See `Benchmark`."""
        self.switch.edits(edits)
        found = self._base.evaluator.model_kl(self.loaded.model, len(self.evaluate))
        self.switch.dense()
        return found


def judge_caches(benchmark: Benchmark, rows: Sequence[Row], record: Callable[[dict[str, Any]], None]) -> None:
    """Quality of the dense model with keys and values rounded, read `CHUNK` tokens a call; rows of formats that it refuses are said.

    Bits are those of a key or value element at the windows' length, everything stored included.
    """
    model, structure = benchmark.loaded.model, benchmark.structure
    caches: dict[str, Callable[[], Any]] = {}
    made: dict[str, Made] = {}
    for row in rows:
        reason = KV_CACHE.refuses(structure, {"format": row.format})
        if reason:
            say(f"left out: {reason}")
            continue
        found, made[row.format] = _calibrated(benchmark, parse_cache_format(row.format))
        caches[row.format] = partial(new_cache, model, parse_cache_format(row.format), found)
    if not caches:
        return

    def tell(done: int, total: int) -> None:
        say(f"caches: window {done} of {total}")

    quality = evaluate(model, benchmark.evaluate, caches, chunk=CHUNK, progress=tell)
    for row in rows:
        if row.format in quality:
            record(_cache_item(benchmark, row, quality[row.format], made[row.format]))


def _calibrated(benchmark: Benchmark, fmt: CacheFormat) -> tuple[Calibration | None, Made]:
    if not fmt.calibrated:
        return None, Made()
    with peak_memory() as peak:
        began = time.process_time()
        found = calibrate(benchmark.loaded.model, fmt, benchmark.calibrate)
        return found, Made(time.process_time() - began, peak())


def _cache_item(benchmark: Benchmark, row: Row, quality: CacheQuality, made: Made) -> dict[str, Any]:
    n, length = benchmark.evaluate.shape
    cost = KV_CACHE.cost(benchmark.structure, {"format": row.format}, n, length, attention_windows(benchmark.loaded.model))
    return {
        "method": row.method,
        "format": row.format,
        "in_order": False,
        "key": benchmark.key,
        "command": shown(),
        "family": row.family,
        "simulated": KV_CACHE.simulated({"format": row.format}),
        "sites": 0,
        "plain_sites": 0,
        "all_sites": 0,
        "bits": cost.bits_per_element,
        "errors": {},
        "kl": quality.kl,
        "kl_stderr": stderr(quality.kl_each),
        "perplexity": math.exp(sum(quality.nll_each) / len(quality.nll_each)),
        "cpu_seconds": made.seconds,
        "blocks": len(benchmark.structure.blocks),
        "peak_mib": made.peak_mib,
    }
