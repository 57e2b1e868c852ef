"""Weights made in order take the place of the others where that may pay and does."""

from typing import Any

import pytest

from methods.policy import Decision, Policy
from search.evaluate import Quality
from search.finalists import Finalist, Judge
from search.in_order import ORDER_PAYS

CALIBRATED = Policy({"site": (Decision.of("gptq", format="w4a16-g64"),)})
ROUNDED = Policy({"site": (Decision.of("rtn", format="w4a16-g64"),)})


def finalist(policy: Policy, kl: float) -> Finalist:
    return Finalist("found", policy, False, 1.0, 0.9, 1.1, 0.5, 0.45, 0.55, 1.0, True, 100, kl=kl, plain_kl=kl)


@pytest.mark.parametrize(
    ("policy", "before", "in_order", "tried", "taken"),
    [
        (CALIBRATED, 2 * ORDER_PAYS, ORDER_PAYS, True, True),
        (CALIBRATED, 2 * ORDER_PAYS, 3 * ORDER_PAYS, True, False),
        (CALIBRATED, 0.9 * ORDER_PAYS, 0.0, False, False),  # too little is lost for order to matter
        (ROUNDED, 2 * ORDER_PAYS, 0.0, False, False),  # nothing depends on calibration
    ],
)
def test_order(
    monkeypatch: pytest.MonkeyPatch, policy: Policy, before: float, in_order: float, tried: bool, taken: bool
) -> None:
    asked: list[bool] = []

    def quality(self: Judge, role: str, title: str, own: Policy, recompressed: bool, edits: Any) -> Quality:
        asked.append(recompressed)
        return Quality((in_order, in_order), (1.0, 1.0), 8)

    monkeypatch.setattr(Judge, "_quality", quality)
    item = finalist(policy, before)
    found = Judge(None, None).reordered(item)  # type: ignore[arg-type]
    assert asked == [True] * tried
    assert (found.recompressed, found.kl, found.plain_kl) == (taken, in_order if taken else before, before)
