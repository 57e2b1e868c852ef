"""What key/value-cache formats cost: `python -m results.benchmarks.kv_cache` prints the table of kv_cache.md."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.kv.cache import attention_windows, new_cache
from methods.kv.calibrate import calibrate
from methods.kv.format import parse_cache_format
from methods.kv.quality import evaluate
from methods.model.load import LoadedModel, load
from profilers.kv_cache import new_cache as dense_cache
from search.data import generate_tokens

FORMATS = (
    *("kv-bf16", "kv-fp8", "kv-fp8-head", "kv-fp8-tensor", "kv-int8"),
    *(
        "kv-int-k8v4",
        "kv-int-k4v8",
        "kv-int4",
        "kv-int4-g32",
        "kv-int4-smooth",
        "kv-int4-rot",
        "kv-turbo4",
        "kv-kivi4-g32-w128",
    ),
    *("kv-int3-rot", "kv-turbo3", "kv-int2-g32", "kv-turbo2", "kv-kivi2-g32-w128", "kv-kivi2-g32-rot-w128"),
    *("kv-kvquant4-s1", "kv-kvquant3-s1", "kv-kvquant2-s1"),
)
CONTEXTS = (512, 2048)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="as for `search run` (default: the default model)")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/isolatency").expanduser(), help="folder of converted models"
    )
    parser.add_argument("--text", type=Path, default=None, help="read this file (default: text that the model writes)")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=8, help="tokens a call")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    options = parser.parse_args()
    loaded = load(options.model, options.cache)
    tokens, calibration_tokens = _tokens(loaded, options)
    out = sys.stdout.write
    out(_header(loaded, options))
    caches: dict[str, Callable[[], Any]] = {}
    for name in options.formats:
        fmt = parse_cache_format(name)
        reason = fmt.refuses(loaded.structure)
        if reason:
            sys.stderr.write(f"left out: {reason}\n")
            continue
        found = calibrate(loaded.model, fmt, calibration_tokens) if fmt.calibrated else None
        caches[name] = partial(new_cache, loaded.model, fmt, found)
    quality = evaluate(loaded.model, tokens, caches, chunk=options.chunk, progress=_progress)
    windows = attention_windows(loaded.model)
    fp32 = replace(loaded.structure, dtype="fp32")
    out("| format | bits at 512 | KiB at 512 | bits at 2048 | KiB at 2048 | KL | NLL rise |\n|---|---|---|---|---|---|---|\n")
    for name, measured in quality.items():
        fmt = parse_cache_format(name)
        # What the table says about memory is what the caches really took, in the dtype that the evaluation computes in.
        assert measured.size_bytes == fmt.size_bytes(fp32, 1, options.length, windows)
        cells = []
        for context in CONTEXTS:
            size = fmt.size_bytes(loaded.structure, 1, context, windows)
            cells += [f"{fmt.bits_per_element(loaded.structure, context):.2f}", f"{size / 1024:.0f}"]
        out(f"| {' | '.join([name, *cells])} | {measured.kl:.5f} | {measured.nll_rise:+.4f} |\n")


def _tokens(loaded: LoadedModel, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """To evaluate on and, disjoint from it, to calibrate on."""
    n, length = options.sequences, options.length
    if options.text is None:
        write = partial(generate_tokens, loaded.model, dense_cache)
        return write(n, length, 0, _progress), write(8, 256, 1, _progress)
    ids = torch.tensor(loaded.tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"])  # type: ignore[misc]
    if len(ids) < n * length + 2048:
        raise SystemExit(f"{options.text} has {len(ids)} tokens; {n * length + 2048} are needed")
    return ids[: n * length].view(n, length), ids[-2048:].view(8, 256)


def _header(loaded: LoadedModel, options: argparse.Namespace) -> str:
    source = f"`{options.text.name}`" if options.text else "text written by the model (seeds 0 and 1)"
    return (
        f"{loaded.label}, {options.sequences} x {options.length} tokens of {source}, {options.chunk} tokens a call, calibrated on 8 x 256 "
        f"others; {platform.machine()}, torch {torch.__version__}, {date.today()}. KL and NLL **measured** in fp32, nats per token.\n\n"
    )


def _progress(done: int, total: int) -> None:
    if done == total or done % 50 == 0 or total < 50:
        sys.stderr.write(f"{done}/{total}\n")


if __name__ == "__main__":
    main()
