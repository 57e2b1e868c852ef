"""The benchmark's rows as a CSV file and as a page."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import CHUNK

FAMILIES = ("rounding", "transform", "activation", "partition", "compensation", "format", "whole model", "cache")


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """table.csv and README.md, by family, then format, then KL divergence."""
    order = {family: index for index, family in enumerate(FAMILIES)}
    rows = sorted(rows, key=lambda row: (order.get(row["family"], len(order)), row["format"], row["kl"] or float("inf")))
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["errors"]))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = (
            "family",
            "method",
            "format",
            "in_order",
            "bits",
            "kl",
            "kl_stderr",
            "perplexity",
            "cpu_seconds",
            "blocks",
            "peak_mib",
            "sites",
            "plain_sites",
        )
        writer.writerow([*names, *(f"error_{kind}" for kind in kinds), "simulated"])
        for row in rows:
            errors = [row["errors"].get(kind, "") for kind in kinds]
            writer.writerow([*(row[name] for name in names), *errors, row["simulated"]])
    (folder / "README.md").write_text(_page(rows, kinds, facts))


def _page(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], facts: Mapping[str, Any]) -> str:
    blocks = ", ".join(str(block + 1) for block in facts["blocks"])
    lines = [
        "# Methods",
        "",
        f"{facts['model']} (weights {facts['digest']}), calibrated on {facts['calibration']}, judged on {facts['evaluation']}, which no",
        f"method has seen. Dense perplexity: {facts['dense_perplexity']:.2f}. All numbers are **measured**, with the reference numerics of",
        f"each format, on {facts['threads']} thread(s), torch {facts['torch']}, {facts['date']}, seed 0.",
        "",
        *(f"- {note}" for note in facts["notes"]),
        "",
        "Errors are those of a site's outputs relative to their energy, on the held-out text, in percent, with nothing else compressed:",
        f"the geometric mean over blocks {blocks}. KL is that of the whole model from the dense one, nats per token, ± its standard error",
        "over the windows; – where only those blocks were compressed. Seconds are CPU seconds of compressing, of all blocks or of",
        "as many as stand in brackets, without the calibration pass, which sees the dense model or, *in order*, the compressed",
        "blocks before; MiB is the most that compressing one block added to the process. *+n*: at n sites, which the method",
        "refuses, stands its plain rounding in the same format; sites that refuse the format stay dense. *s*: simulated, no",
        "kernel here runs it. Rotations of the whole model count with what followed at its sites, and are judged from the model as",
        "stored; *mofq* is at each site the format or the minifloats of as many bits. Of caches: bits of a key or value element at the",
        f"windows' length; KL and perplexity of text read {CHUNK} tokens a call, but for the first; seconds of calibrating.",
        "",
        *(f"    {command}" for command in facts["commands"]),
        "",
        "What it says, and where it surprises: [NOTES.md](NOTES.md).",
        "",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += [f"## {family}", "", "| method | format | bits | " + " | ".join(kinds) + " | KL | perplexity | s | MiB |"]
        lines.append("|---|---|--:|" + "--:|" * (len(kinds) + 4))
        lines += [_line(row, kinds) for row in rows if row["family"] == family]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Mapping[str, Any], kinds: Sequence[str]) -> str:
    name = (
        row["method"]
        + (", in order" if row["in_order"] else "")
        + (" *s*" if row["simulated"] else "")
        + (f" *+{row['plain_sites']}*" if row["plain_sites"] else "")
    )
    errors = [f"{row['errors'][kind]:.3%}".rstrip("%") if kind in row["errors"] else "" for kind in kinds]
    dense = row["all_sites"] - row["sites"] - row["plain_sites"] if row["kl"] is not None else 0
    fmt = row["format"] + (f" ({dense} sites dense)" if dense else "")
    whole = ("–", "–")
    if row["kl"] is not None:
        whole = (f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}", f"{row['perplexity']:.2f}")
    cells = [name, fmt, f"{row['bits']:.2f}", *errors, *whole]
    memory = "" if math.isnan(row["peak_mib"]) else f"{row['peak_mib']:.0f}"
    seconds = f"{row['cpu_seconds']:.0f}" + ("" if row["kl"] is not None else f" ({row['blocks']} blocks)")
    return "| " + " | ".join([*cells, seconds, memory]) + " |"
