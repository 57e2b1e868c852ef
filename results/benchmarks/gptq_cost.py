"""What GPTQ of the whole default model costs: CPU seconds of one sweep over all its linears, and the memory it takes.

    python -m results.benchmarks.gptq_cost

Calibrates on random tokens, whose cost is that of any text, block by block, rounds every linear and drops the result. Memory is the peak
of the process less what it held once the libraries were imported: model, statistics, hidden states and temporaries. Prints JSON.

On a busy machine threads that spin while they wait for each other count as CPU time: OMP_WAIT_POLICY=passive keeps them from it. glibc
keeps some 40 to 100 MB of freed temporaries; MALLOC_MMAP_THRESHOLD_=4194304 makes it give them back at once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from methods.apply import site_view
from methods.calibrate import sweep
from methods.catalogue import apply, needs
from methods.method import Edit, Stats
from methods.model.load import load
from methods.policy import Decision


def memory(field: str) -> int:
    """Bytes of the process: VmRSS now, or VmHWM at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Makes VmHWM start anew at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_s() -> float:
    """User and system seconds of all threads so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--method", default="gptq:format=w4a16-g64", help="a decision (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="sequences that run together (default: 1, as in a search)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "isolatency")
    parser.add_argument("--in-order", action="store_true", help="later blocks see the rounded ones before them")
    return parser.parse_args()


def main() -> None:
    """Runs the sweep and prints what it cost."""
    options = arguments()
    # Whatever the model's classes import lazily belongs to the libraries.
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.LlamaForCausalLM
    imported = memory("VmRSS")
    loaded = load(options.model, options.cache)
    forget_peak()
    decision, structure = Decision.parse(options.method), loaded.structure
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (options.sequences, options.length), generator=generator)
    rounded = {"linears": 0, "in_methods_s": 0.0}

    def visit(block: int, stats: Mapping[str, Stats]) -> dict[str, Edit]:
        edits, began = {}, cpu_s()
        for site in structure.in_block(block):
            edit = apply(site_view(loaded.model, structure, site), stats, decision)
            rounded["linears"] += len(edit.linears)
            if options.in_order:
                edits[site.name] = edit
        rounded["in_methods_s"] += cpu_s() - began
        return edits

    began, at = cpu_s(), time.perf_counter()
    wanted = {site.name: needs([decision]) for site in structure.sites}
    sweep(loaded.model, structure, torch.split(tokens, options.batch), wanted, visit, dense=not options.in_order)
    used, wall = cpu_s() - began, time.perf_counter() - at
    dense = 4 * sum(parameter.numel() for parameter in loaded.model.parameters())
    peak = memory("VmHWM") - imported
    result = {
        "method": str(options.method),
        "in_order": options.in_order,
        "linears": rounded["linears"],
        "tokens": tokens.numel(),
        "threads": torch.get_num_threads(),
        "cpu_s": round(used, 1),
        "of_it_rounding_s": round(rounded["in_methods_s"], 1),
        "wall_s": round(wall, 1),
        "model_fp32_bytes": dense,
        "peak_bytes_above_libraries": peak,
        "peak_of_model": round(peak / dense, 3),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
