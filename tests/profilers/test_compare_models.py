import pytest
from torch import nn

from profilers import end_to_end
from profilers.end_to_end import RETAKES, STEADY, Measurement, compare, disturbance
from profilers.target import local_cpu
from profilers.timer import Sample, Samples
from profilers.workload import Workload


def _run(ms: list[float], n_slow: int = 0) -> Measurement:
    samples = Samples([Sample(i, v * 1e-3, v * 1e-3, False, slow=i < n_slow) for i, v in enumerate(ms)])
    return Measurement(samples.timing(), samples, 0.0)


def _pair(spread: float, level: float) -> dict[str, Measurement]:
    ratios = [level * (1 + spread * (-1) ** i) for i in range(8)]
    return {"reference": _run([10.0] * 8), "model": _run([10 * ratio for ratio in ratios])}


@pytest.mark.parametrize(
    ("spreads", "calls", "chosen"),
    [((0.01, 0.0, 0.0), 1, 0), ((0.2, 0.02, 0.0), 2, 1), ((0.2, 0.1, 0.3), 1 + RETAKES, 1), ((0.1, 0.2, 0.3), 1 + RETAKES, 0)],
)
def test_two_models_are_timed_again_while_they_are_disturbed(
    spreads: tuple[float, ...], calls: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrowest counts, not the fastest; each try has a level of its own."""
    taken = [_pair(spread, 0.5 + 0.1 * i) for i, spread in enumerate(spreads)]
    asked: list[object] = []

    def measure(models: dict[str, nn.Module], *rest: object, **options: object) -> dict[str, Measurement]:
        asked.append((tuple(models), options))
        return taken[len(asked) - 1]

    monkeypatch.setattr(end_to_end, "measure", measure)
    reference, model = compare(nn.Identity(), nn.Identity(), Workload(), local_cpu(1), rounds=8)
    assert len(asked) == calls and asked[0] == (("reference", "model"), {"rounds": 8})
    assert reference is taken[chosen]["reference"] and model is taken[chosen]["model"]
    assert (model.ratio_to(reference).hi - model.ratio_to(reference).lo) / 2 > STEADY or calls <= RETAKES


@pytest.mark.parametrize(
    ("n_slow", "calls", "chosen"), [((4, 0, 0), 1, 0), ((5, 0, 0), 2, 1), ((5, 8, 0), 3, 2), ((8, 5, 5), 1 + RETAKES, 0)]
)
def test_two_models_are_timed_again_while_most_steps_are_slow(
    n_slow: tuple[int, ...], calls: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steady ratios are no excuse; where all tries were slowed, the first steady one counts and says what it is."""
    taken = [{"reference": _run([10.0] * 8), "model": _run([5.0] * 8, n)} for n in n_slow]
    asked: list[object] = []

    def measure(*_: object) -> dict[str, Measurement]:
        asked.append(None)
        return taken[len(asked) - 1]

    monkeypatch.setattr(end_to_end, "measure", measure)
    reference, model = compare(nn.Identity(), nn.Identity(), Workload(), local_cpu(1))
    assert len(asked) == calls and model is taken[chosen]["model"]
    words = disturbance([reference, model])
    assert model.slowed == bool(words) == (n_slow[chosen] > 4)
    assert not words or "most steps of 1 of 2 whole-model runs" in words
