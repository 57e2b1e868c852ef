"""`search profile`: this machine turned into a table that other machines can search with."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from profilers import end_to_end, stored
from profilers.campaign import local, provenance, sweep
from profilers.cells import model_key, widths_of
from profilers.checks import problems
from profilers.plan import DECODE_ROWS, FORMATS, PREFILL_ROWS, cells, log_uniform, model_cells, operators, read_shapes
from profilers.runtime import Runtime, dense_candidates
from profilers.table import KernelKey, LatencyTable, Row
from profilers.target import Target
from search.config import ConfigError, RunConfig
from search.files import check_place
from search.progress import Progress
from search.session import Session

if TYPE_CHECKING:
    from profilers.workload import Workload

ROUNDS = 24


@dataclass(frozen=True)
class Profiled:
    """What a profile measured: cells in the table, those that the budget left, what its checks say, and where it lies."""

    path: Path
    description: str
    cells: int
    left: int
    problems: tuple[str, ...]
    stored: Path | None = None


def profile(
    config: RunConfig, shapes: str, plan: int, budget_s: float, out: str, progress: Progress, with_model: bool
) -> Profiled:
    """Measures what the table of `config.target` lacks and writes it to `out` (Parquet) where given; the next call goes on.

    with_model: the shapes of `config.model` and whole dense steps of the stated workloads; shapes: a file of them; plan: so many
    log-uniform ones besides. Raises ValueError where the target is not here, or nothing is to be measured.
    """
    if not with_model and not shapes and not plan:
        raise ConfigError("profile: say what to measure: --model, --shapes FILE or --plan N")
    path = Path(out) if out else None
    if path is not None and path.suffix != ".parquet":
        raise ConfigError(f"--out {out}: a table is stored as NAME.parquet, NAME being what --target will say")
    if path is not None:
        check_place(path, "--out")
    target = local(config.target, config.threads or None)
    folder = config.cache_folder / "tables"
    table = LatencyTable.open(folder, target)
    session = Session(replace(config, target=target.name), progress) if with_model else None
    for note in session.fit_notes if session is not None else ():
        progress.say(note)
    keys = _keys(session, config, target, shapes, plan)
    progress.say(f"measuring {len(table.missing(keys))} of {len(keys)} cells on {target.description}; table {table.path}")
    with progress.bar("latency table") as update:
        left = sweep(target, keys, table, budget_s=budget_s, progress=update, notify=progress.say, lock_folder=folder)
    if session is not None:
        _whole_models(session, target, table, config.workloads)
    how = provenance(target, sys.argv)
    table.describe(how)
    found = tuple(problems(table))
    for problem in found:
        progress.say(f"this table fails its own checks: {problem}; measure again when the machine is quiet")
    if path is not None:
        stored.write(table, path, how)
    return Profiled(table.path or folder, target.description, len(list(table.keys())), len(left), found, path)


def merge(files: Sequence[str], out: str) -> Profiled:
    """Tables of one device, of either kind of file, put together in `out`; raises TableError where they are of two."""
    if not out.endswith(".parquet"):
        raise ConfigError("--merge needs --out NAME.parquet")
    table = stored.merge([LatencyTable.read(Path(name)) for name in files])
    stored.write(table, Path(out))
    return Profiled(Path(out), table.description, len(list(table.keys())), 0, tuple(problems(table)), Path(out))


def _keys(session: Session | None, config: RunConfig, target: Target, shapes: str, plan: int) -> list[KernelKey]:
    formats = config.formats or FORMATS[target.device]
    found: list[KernelKey] = []
    if session is not None:
        rows = dict.fromkeys([*(workload.tokens_in_flight for workload in config.workloads), *DECODE_ROWS, *PREFILL_ROWS])
        found += model_cells(session.stored.structure, formats, list(rows), session.experts_per_token)
        found += operators([widths_of(session.stored.structure)], target.compute_dtype, config.workloads)
    listed = read_shapes(Path(shapes)) if shapes else []
    return list(dict.fromkeys([*found, *cells([*listed, *(log_uniform(plan) if plan else [])], formats)]))


def _whole_models(session: Session, target: Target, table: LatencyTable, workloads: Sequence[Workload]) -> None:
    """The dense model's step in every workload, which tells what passes outside of the kernels."""
    structure = session.stored.structure
    for workload in workloads:
        models = dense_candidates(Runtime(session.stored.model, structure, target, table, workload))
        with session.progress.bar(f"whole model, {workload.name}") as update:
            found = end_to_end.measure(
                models,
                workload,
                target,
                rounds=ROUNDS,
                cache=session.config.cache_folder,
                notify=session.progress.say,
                progress=update,
            )
        session.progress.say(end_to_end.disturbance(found.values()))
        name = min(found, key=lambda each: found[each].median_ms)
        run, samples = found[name], found[name].samples.all
        cpu_ms = 1e3 * math.fsum(sample.cpu for sample in samples) / len(samples)
        size = structure.n_parameters * 2
        table.add([Row(name, model_key(structure, workload), "ok", "", "", run.timing, size, cpu_ms, run.load, cold=False)])
