"""Two models in turns: more is measured while the machine is unsteady or slow, and what was measured well counts together."""

from __future__ import annotations

import pytest
from torch import nn

from profilers import end_to_end
from profilers.end_to_end import RETAKES, Measurement, compare, disturbance, pooled
from profilers.target import local_cpu
from profilers.timer import Sample, Samples
from profilers.workload import Workload

Pair = dict[str, Measurement]


def _run(ms: list[float], n_slow: int = 0) -> Measurement:
    samples = Samples([Sample(i, v * 1e-3, v * 1e-3, False, slow=i < n_slow) for i, v in enumerate(ms)])
    return Measurement(samples.timing(), samples, 0.0)


def _pair(spread: float, level: float = 0.5, n_slow: int = 0) -> Pair:
    ratios = [level * (1 + spread * (-1) ** i) for i in range(8)]
    return {"reference": _run([10.0] * 8), "model": _run([10 * ratio for ratio in ratios], n_slow)}


def _compared(taken: list[Pair], monkeypatch: pytest.MonkeyPatch) -> tuple[int, Measurement, Measurement]:
    """How often was measured, and what came of it."""
    asked: list[object] = []

    def measure(models: dict[str, nn.Module], *rest: object, **options: object) -> Pair:
        asked.append((tuple(models), options))
        return taken[len(asked) - 1]

    monkeypatch.setattr(end_to_end, "measure", measure)
    reference, model = compare(nn.Identity(), nn.Identity(), Workload(), local_cpu(1), rounds=8)
    assert asked[0] == (("reference", "model"), {"rounds": 8})
    return len(asked), reference, model


@pytest.mark.parametrize(("spreads", "calls"), [((0.01, 0.0, 0.0), 1), ((0.2, 0.01, 0.01), 2), ((0.2, 0.1, 0.3), 1 + RETAKES)])
def test_more_is_measured_while_the_ratio_is_unsteady(
    spreads: tuple[float, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it counts, so that no ratio is picked out."""
    n_calls, reference, model = _compared([_pair(spread, 0.5 + 0.1 * i) for i, spread in enumerate(spreads)], monkeypatch)
    assert n_calls == calls and len(model.samples.all) == len(reference.samples.all) == 8 * calls
    assert 0.5 <= model.ratio_to(reference).mid <= 0.7


@pytest.mark.parametrize(
    ("n_slow", "calls", "counting"),
    [((4, 0, 0), 1, {0.5}), ((5, 0, 0), 2, {0.6}), ((5, 8, 0), 3, {0.7}), ((8, 5, 5), 3, {0.5, 0.6, 0.7})],
)
def test_more_is_measured_while_most_steps_are_slow(
    n_slow: tuple[int, ...], calls: int, counting: set[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow steps count only where there are no others, and then the result says so."""
    n_calls, reference, model = _compared([_pair(0.0, 0.5 + 0.1 * i, n) for i, n in enumerate(n_slow)], monkeypatch)
    assert n_calls == calls
    assert {round(sample.wall * 100, 3) for sample in model.samples.all} == {round(ratio, 3) for ratio in counting}
    words = disturbance([reference, model])
    assert model.slowed == bool(words) == (len(counting) == 3)
    assert not words or "most steps of 1 of 2 whole-model runs" in words


def test_pooled_runs_are_paired_round_by_round() -> None:
    """The second run's machine is three times as slow for both: the ratio is what it was."""
    ours = pooled([_run([5.0, 5.0, 6.0]), _run([15.0, 18.0, 15.0])])
    theirs = pooled([_run([10.0] * 3), _run([30.0] * 3)])
    assert [sample.turn for sample in ours.samples.all] == list(range(6))
    assert ours.ratio_to(theirs).mid == pytest.approx(0.5) and ours.timing.repeats == 6
    assert ours.ratio_to(theirs).hi == pytest.approx(0.6)
