"""The commands about machines: what there is, what spoils it, its table, and an answer's validation on it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.config import add_flags, check_range, default_cache, device_folders, from_arguments

Run = Callable[[argparse.Namespace], int]
"""What a command does, and its exit status."""

Command = Callable[[str, Run, str], argparse.ArgumentParser]
"""Registers a command: its name, what runs it, one line about it."""


@dataclass(frozen=True)
class Shown:
    """What a command says: plain values, the same for people, and its exit status."""

    value: Any
    text: str
    status: int = 0


def register(command: Command, printed: Callable[[Callable[[argparse.Namespace], Shown]], Run], validate: Run) -> None:
    """Adds the commands to the command line; printed: turns one of these functions into what prints its result."""
    found = command("targets", printed(targets), "the machines that can be searched for, and what their names stand for here")
    found.add_argument("--devices", default="", metavar="DIR", help="folder of latency tables from other machines")
    found = command("doctor", printed(doctor), "what this machine can measure, and what spoils it")
    found.add_argument("--cache", default="", help="cache folder to check")
    found = command("profile", printed(profile), "measure this machine's latency table, for searches here or elsewhere")
    run_flags(found, {"target", "model", "workload", "formats", "threads", "cache"})
    found.add_argument("--shapes", default="", metavar="FILE", help="shapes to measure: outputs and inputs, one shape a line")
    found.add_argument("--plan", type=int, default=0, metavar="N", help="so many log-uniform shapes besides")
    found.add_argument("--budget", default="", metavar="TIME", help="time to measure, 10m; the same command goes on from there")
    found.add_argument("--out", default="", metavar="FILE", help="NAME.parquet to write, for --target NAME elsewhere")
    found.add_argument("--merge", action="append", default=[], metavar="FILE", help="tables to put together instead; repeat it")
    found = command("validate", validate, "measure an unvalidated answer on its target: confirm it, or solve it again")
    found.add_argument("study", help="the study's folder")
    found.add_argument("--objective", default="", help="which answer, for example 0.6x; default: the latest")
    found.add_argument(
        "--on", default="", choices=["cpu", "cuda"], help="this machine is the target, in another set-up than its table's"
    )


def run_flags(parser: argparse.ArgumentParser, wanted: set[str]) -> None:
    """Some of the run's flags, for another command."""
    scratch = argparse.ArgumentParser(add_help=False)
    add_flags(scratch)
    for action in scratch._actions:
        if action.dest in wanted:
            parser._add_action(action)


def targets(arguments: argparse.Namespace) -> Shown:
    """Every name, what it stands for on this machine, and why."""
    from profilers.resolution import listing

    rows = [
        {
            "name": found.name,
            "state": found.state,
            "label": "" if found.target is None else found.target.label,
            "description": "" if found.target is None else found.target.description,
            "why": found.why,
        }
        for found in listing(device_folders(arguments.devices))
    ]
    lines = []
    for row in rows:
        lines.append(f"{row['name']:<12} {row['state']:<14} {row['label']:<12} {row['description'] or row['why']}".rstrip())
        if row["description"]:
            lines.append(f"{'':<40} from {row['why']}")
    lines.append(
        "here: measured on this machine; stored table: measured elsewhere; sister's table: of a device of the same generation, rescaled; "
        "datasheet: only with --allow-modelled"
    )
    return Shown(rows, "\n".join(lines))


def doctor(arguments: argparse.Namespace) -> Shown:
    """What the machine can measure; status 1 where something is to be looked at."""
    from profilers.doctor import doctor as examine

    findings = examine(Path(arguments.cache) if arguments.cache else default_cache())
    lines = [f"{'ok  ' if finding.ok else 'look'}  {finding.name:<18} {finding.detail}" for finding in findings]
    return Shown([vars(finding) for finding in findings], "\n".join(lines), 0 if all(f.ok for f in findings) else 1)


def profile(arguments: argparse.Namespace) -> Shown:
    """Measures or merges a table; status 1 where the table fails its own checks or the budget left cells."""
    from profilers.duration import parse_duration
    from profilers.plan import PLANS
    from search.profile import merge
    from search.profile import profile as measure
    from search.progress import Progress

    if arguments.merge:
        result = merge(arguments.merge, arguments.out)
    else:
        check_range("--plan", arguments.plan, PLANS)
        budget_s = parse_duration(arguments.budget) if arguments.budget else math.inf
        named = hasattr(arguments, "model") or not (arguments.shapes or arguments.plan)
        result = measure(
            from_arguments(arguments), arguments.shapes, arguments.plan, budget_s, arguments.out, Progress(), named
        )
    lines = [f"{result.path}: {result.cells} cells of {result.description}"]
    lines += [f"fails its own checks: {problem}" for problem in result.problems]
    lines += [f"{result.left} cells are left; the same command goes on"] if result.left else []
    lines += [f"stored as {result.stored}"] if result.stored else []
    value = {**vars(result), "path": str(result.path), "stored": str(result.stored or ""), "problems": list(result.problems)}
    return Shown(value, "\n".join(lines), 1 if result.problems or result.left else 0)
