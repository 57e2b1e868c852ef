"""How many whole-model runs a latency map takes, what it is of on a busy machine, and the objective that binds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from methods.policy import DENSE, Decision
from profilers.end_to_end import Measurement
from profilers.timer import Sample, Samples
from profilers.workload import Workload
from search import whole_model
from search.prepared import Option, SiteOptions
from search.progress import Progress

SITES = [
    SiteOptions(
        f"s{i}",
        ("qkv", "o", "down")[i % 3],
        i,
        100,
        tuple(
            Option(DENSE.label if fmt == "bf16" else Decision.of("rtn", format=fmt).label, fmt, bits, int(bits * 100), ms, "k")
            for fmt, ms, bits in (
                ("bf16", 0.5, 16.0),
                ("w8a8-g64", 0.3, 8.25),
                ("w4a8-g64", 0.2, 4.25),
                ("w2a8-g64", 0.1, 2.25),
            )
        ),
    )
    for i in range(12)
]
MS = {option.format: option.ms for option in SITES[0].options}
OUTSIDE_MS = 4.0


def _run(ms: float, slow: bool) -> Measurement:
    samples = Samples([Sample(i, ms * 1e-3 * (1 + 1e-4 * (i % 3)), ms * 1e-3, False, slow) for i in range(8)])
    return Measurement(samples.timing(), samples, 0.0)


class Machine:
    """Where a step takes `OUTSIDE_MS`, its kernels, and of every second run `noise` more; counts the runs."""

    def __init__(self, noise: float = 0.0, slow: bool = False) -> None:
        self.noise, self.slow, self.n = noise, slow, 0
        self.dense_ms = 12 * MS["bf16"]

    def compare(self, dense: Any, model: dict[str, Any], *_: Any, **__: Any) -> tuple[Measurement, Measurement]:
        kernels = sum(MS[model[site.name].name] if site.name in model else MS["bf16"] for site in SITES)
        self.n += 1
        factor = 1 + self.noise * (-1) ** self.n
        return _run(OUTSIDE_MS + self.dense_ms, self.slow), _run((OUTSIDE_MS + kernels) * factor, self.slow)


def _pairs(machine: Machine, monkeypatch: pytest.MonkeyPatch, clock: Any = None, stored: bool = True) -> Any:
    monkeypatch.setattr(whole_model.end_to_end, "compare", machine.compare)
    if clock is not None:
        monkeypatch.setattr(whole_model, "time", SimpleNamespace(monotonic=clock))
    session: Any = SimpleNamespace(
        config=SimpleNamespace(seed=0, cache_folder=Path()), progress=Progress(quiet=True), target=SimpleNamespace()
    )
    engine: Any = SimpleNamespace(stand_in=lambda formats: formats)
    return whole_model._measured(session, SITES, Workload(), engine, engine, stored)


def test_a_map_that_is_exact_takes_no_more_runs_than_an_interval_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    found = _pairs(machine, monkeypatch)
    assert machine.n == len(found.policies) == whole_model.FEWEST_RUNS - 1
    fitted, _, label = whole_model._fitted(found.runs(SITES), found.hopeless, print)
    assert fitted.predict(2.4).mean == pytest.approx(OUTSIDE_MS + 2.4, rel=1e-3) and label == "measured"


def test_a_dense_model_rounded_to_another_dtype_is_what_runs_are_relative_to_and_no_run_of_the_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sites that a policy leaves dense are slower than its: with it among the runs the map would be no line."""
    machine = Machine()
    machine.dense_ms = 12 * 0.4
    found = _pairs(machine, monkeypatch, stored=False)
    assert machine.n == len(found.policies) == whole_model.FEWEST_RUNS and len(found.runs(SITES)) == len(found.policies)
    fitted, _, _ = whole_model._fitted(found.runs(SITES), found.hopeless, print)
    assert fitted.predict(2.4).mean == pytest.approx(OUTSIDE_MS + 2.4, rel=1e-3)
    assert found.dense_ms[0] == pytest.approx(OUTSIDE_MS + 12 * 0.4, rel=1e-3)


def test_runs_end_where_the_interval_no_longer_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(noise=0.1)
    _pairs(machine, monkeypatch)
    assert whole_model.FEWEST_RUNS - 1 + whole_model.STALLED <= machine.n < len(whole_model.map_policies(SITES, 0))


def test_a_machine_that_disturbs_every_run_has_a_map_of_kernel_sums_and_its_label_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, said = Machine(slow=True), []
    found = _pairs(machine, monkeypatch)
    assert machine.n == whole_model.HOPELESS and found.hopeless
    fitted, scales, label = whole_model._fitted(found.runs(SITES), found.hopeless, said.append)
    assert (fitted.b1, scales, label) == (1.0, {}, "interpolated") and "kernel sums alone" in said[0]
    assert fitted.predict(2.4).mean == pytest.approx(OUTSIDE_MS + 2.4, rel=1e-3)


def test_runs_that_take_far_longer_than_their_steps_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which one run took an hour: what was made by then is what the map is fitted on."""
    hours = iter(range(0, 10**6, 3600))
    machine = Machine(noise=0.1)
    _pairs(machine, monkeypatch, lambda: float(next(hours)))
    assert machine.n == whole_model.HOPELESS
