"""What first tokens share counts as often as it is read, where keys and values are computed, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from methods.catalogue import METHODS, apply
from methods.formats.format import parse_format
from methods.method import Need, SiteView, Stats
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision, Knob
from methods.quant import first
from methods.quant.feedback import column_rounder, feedback
from methods.quant.minmax import minmax
from methods.quant.rounders import damping
from methods.quant.task import Task, scaled

D_IN, D_OUT, N, LENGTH = 144, 11, 6, 50
COUNTED = [name for name, recipe in METHODS.items() if "first" in recipe.knobs]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 3) -> torch.Tensor:
    """(N, LENGTH, D_IN): correlated; first tokens quiet, nearly alike and not like the others."""
    x = random(N, LENGTH, 30, seed=seed) @ random(30, D_IN, seed=1) + 0.3 * random(N, LENGTH, D_IN, seed=seed + 50)
    x[:, 0] = 0.5 * random(D_IN, seed=2) + 0.05 * random(N, D_IN, seed=seed + 100)
    return x


X, DENSE = inputs(), inputs() + 0.1 * random(N, LENGTH, D_IN, seed=7)
WEIGHT = 0.05 * random(D_OUT, D_IN, seed=0)


def statistics(x: torch.Tensor = X, dense: torch.Tensor = DENSE, **replaced: torch.Tensor) -> Stats:
    rows, n = x.flatten(0, 1), N * LENGTH
    own = {
        "hessian": rows.T @ rows / n,
        "drift": (dense - x).flatten(0, 1).T @ rows / n,
        "first": x[:, 0],
        "first_drift": (dense - x)[:, 0],
        "abs_max": rows.abs().amax(0),
        "abs_mean": rows.abs().mean(0),
        "sample": rows[1::3],
    }
    return Stats(n, **{**own, **replaced})


def view(kind: str = "k") -> SiteView:
    site = Site("block.layer", kind, 0, (LayerSpec("layer", kind, 0, D_IN, D_OUT),))
    return SiteView(site, {"layer": WEIGHT})


def task(kind: str = "k", stats: Stats | None = None, **knobs: Knob) -> Task:
    return Task("layer", view(kind), WEIGHT, stats or statistics(), parse_format("w3a16-g48"), knobs)


def compressed(method: str, kind: str = "k", stats: Stats | None = None, **knobs: Knob) -> torch.Tensor:
    fmt = next(f for f in ("w3a16-g48", "e2m1ae4m3-token-g48") if METHODS[method].formats(parse_format(f)) is None)
    edit = apply(view(kind), {"layer": stats or statistics()}, Decision.of(method, format=fmt, **knobs))
    return edit.linears["layer"].dense


@pytest.mark.parametrize(("first_", "times"), [("auto", LENGTH), (7.5, 7.5), (1, 1)])
@pytest.mark.parametrize("kind", ["k", "v", "qkv"])
def test_the_moments_count_first_tokens_so_often(kind: str, first_: float | str, times: float) -> None:
    """Every sequence gets `times - 1` more tokens, all of them the mean first token."""
    lost = DENSE.double() - X.double()
    more, lost_more = X[:, 0].double().mean(0), lost[:, 0].mean(0)
    hessian, drift = torch.zeros(D_IN, D_IN).double(), torch.zeros(D_IN, D_IN).double()
    for x, missing in zip(X.double(), lost, strict=True):
        for t in range(LENGTH):
            hessian += torch.outer(x[t], x[t])
            drift += torch.outer(missing[t], x[t])
        hessian += (times - 1) * torch.outer(more, more)
        drift += (times - 1) * torch.outer(lost_more, more)
    own = task(kind, first=first_)
    assert first.times(own) == times
    torch.testing.assert_close(first.hessian(own).double(), hessian / (N * LENGTH), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.drift(own).double(), drift / (N * LENGTH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["q", "o", "up", "gate_up", "down", "other"])
def test_outputs_that_no_other_token_reads_count_all_tokens_alike(kind: str) -> None:
    own = task(kind, first="auto")
    assert first.times(own) == 1
    assert first.hessian(own) is own.stats.hessian and first.drift(own) is own.stats.drift


def test_a_site_of_several_layers_counts_where_one_of_them_is_read() -> None:
    layers = tuple(LayerSpec(kind, kind, 0, D_IN, D_OUT) for kind in ("q", "k", "v"))
    assert first.reads_first(Site("q+k+v", "qkv", 0, layers))
    assert not first.reads_first(Site("q", "q", 0, layers[:1]))


def test_first_tokens_that_share_nothing_count_like_any_other() -> None:
    """A sink gains its whole energy once more; tokens that are pairwise opposite gain none."""
    opposite = torch.cat([X[: N // 2, 0], -X[: N // 2, 0]])
    own = task("k", statistics(first=opposite), first="auto")
    assert own.stats.hessian is not None
    torch.testing.assert_close(first.hessian(own), own.stats.hessian)


def test_without_a_first_token_nothing_is_counted() -> None:
    none = torch.zeros(0, D_IN)
    own = task("k", statistics(first=none, first_drift=none), first="auto")
    assert first.hessian(own) is own.stats.hessian and first.drift(own) is own.stats.drift


def test_the_first_token_scales_with_the_inputs() -> None:
    ratio = torch.exp(random(D_IN, seed=9))
    own = task("k", scaled(statistics(), ratio), first="auto")
    wanted = first.hessian(task("k", statistics(X / ratio, DENSE / ratio), first="auto"))
    torch.testing.assert_close(first.hessian(own), wanted, rtol=1e-4, atol=1e-4)


def loud() -> Stats:
    """First tokens, alike, of 10,000 times the others' energy, as where a linear makes the sink."""
    x = X.clone()
    x[:, 0] = 200 * random(D_IN, seed=2)
    return statistics(x)


@pytest.mark.parametrize("kind", ["k", "down"])
def test_damping_is_a_part_of_what_the_other_tokens_have(kind: str) -> None:
    stats = loud()
    own = task(kind, stats, first="auto", damping=0.3)
    rest = X[:, 1:].flatten(0, 1).square().sum() / (N * LENGTH) / D_IN
    assert damping(own) * float(first.hessian(own).diagonal().mean()) == pytest.approx(0.3 * float(rest), rel=1e-2)
    assert damping(task(kind, stats, first=1, damping=0.3)) == 0.3
    assert damping(task(kind, statistics(first=torch.zeros(0, D_IN)), first="auto", damping=0.3)) == 0.3


def test_a_loud_first_token_leaves_feedback_to_the_others() -> None:
    """Damped by the loud token's energy the others would be rounded as if to nearest."""
    held, near = inputs(seed=30)[:, 1:], apply(view("down"), {}, Decision.of("rtn", format="w3a16-g48")).linears["layer"].dense
    errors = [
        float((held @ (values - WEIGHT).T).square().sum())
        for values in (compressed("gptq", "down", loud()), compressed("gptq", "down", loud(), first=1), near)
    ]
    assert errors[0] < 0.7 * errors[1] and errors[1] > 0.7 * errors[2]


@pytest.mark.parametrize("act_order", [True, False])
def test_a_weight_of_one_is_gptq_as_published(act_order: bool) -> None:
    fmt, stats = parse_format("w3a16-g48"), statistics()
    grid = minmax(WEIGHT, fmt)
    assert stats.hessian is not None
    plain = feedback(WEIGHT, stats.hessian, column_rounder(fmt, grid, D_IN), 0.02, act_order=act_order).codes
    knobs: dict[str, Knob] = {"format": fmt.name, "damping": 0.02, "act_order": act_order}
    edits = [apply(view(), {"layer": stats}, Decision.of("gptq", **knobs, first=times)) for times in (1, "auto")]
    assert torch.equal(edits[0].linears["layer"].payload["codes"], plain)
    assert not torch.equal(edits[1].linears["layer"].payload["codes"], plain)


def few_steps(name: str) -> dict[str, Knob]:
    return {"steps": 40} if METHODS[name].learner else {}


@pytest.mark.parametrize("name", [name for name in COUNTED if METHODS[name].transform not in ("awq", "smooth")])
def test_a_weight_of_one_is_the_method_that_knows_no_first_token(name: str) -> None:
    """Bit for bit, in every method that has the knob; by default the codes of keys and values are others."""
    none, knobs = torch.zeros(0, D_IN), few_steps(name)
    without = compressed(name, stats=statistics(first=none, first_drift=none), **knobs)
    assert torch.equal(compressed(name, first=1, **knobs), without)
    assert not torch.equal(compressed(name, **knobs), without)


def test_the_knob_is_where_the_statistic_is_read() -> None:
    assert {name for name, recipe in METHODS.items() if Need.FIRST in recipe.needs} == set(COUNTED)
    assert {"gptq", "gptaq", "ldlq", "obq", "greedy", "awq-gptq", "spqr", "qera"} < set(COUNTED)


@pytest.mark.parametrize("name", ["gptq", "gptaq", "ldlq", "obq", "gptq-greedy"])
def test_first_tokens_gain_what_the_others_hardly_lose(name: str) -> None:
    held = inputs(seed=30)
    plain, counted = compressed(name, first=1, damping=0.01), compressed(name, damping=0.01)

    def error(values: torch.Tensor, x: torch.Tensor) -> float:
        return float((x @ (values - WEIGHT).T).square().sum() / (x @ WEIGHT.T).square().sum())

    assert error(counted, held[:, 0]) < 0.5 * error(plain, held[:, 0])
    assert error(counted, held[:, 1:]) < 1.3 * error(plain, held[:, 1:])


def test_a_sample_gets_a_row_of_what_first_tokens_share_where_keys_are_made() -> None:
    rows = statistics().sample
    assert rows is not None
    once = rows.T @ rows / len(rows) + X[:, 0].T @ X[:, 0] / (N * LENGTH)
    shared = (LENGTH - 1) / LENGTH * torch.outer(X[:, 0].mean(0), X[:, 0].mean(0))
    for kind, expected in (("k", once + shared), ("down", once)):
        found = first.sample(task(kind, first="auto"))
        assert torch.equal(found[: len(rows)], rows)
        torch.testing.assert_close(found.T @ found / len(rows), expected)
    for other in (task(first=1), task()):
        assert torch.equal(first.sample(other), rows)
