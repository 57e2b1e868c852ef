"""What a search may spend: units, what counts, and an answer that comes from what is known when it is spent."""

from dataclasses import replace

import pytest

from profilers.duration import parse_duration
from search.budget import Budget
from search.config import ConfigError, RunConfig


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 min ", 120)])
def test_times(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "why"), [("10", "has no unit; write 10m"), ("soon", "not a time"), ("0m", "above zero")])
def test_times_that_are_none(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RunConfig(budget=text)


def test_tokens_count_once_a_policy() -> None:
    budget = Budget(RunConfig(tokens=1000))
    budget.spend("a", 400)
    budget.spend("a", 800)
    assert budget.n_tokens == 800 and budget.spent() == ""
    budget.spend("b", 200)
    assert budget.spent() == "--tokens 1000"


def test_time_that_an_earlier_process_took_counts() -> None:
    now = [100.0]
    budget = Budget(RunConfig(budget="1m"), clock=lambda: now[0])
    budget.spend("a", 10, remembered_s=35.0)
    now[0] += 20
    assert budget.spent() == ""
    now[0] += 5
    assert budget.spent() == "--budget 1m"
    assert Budget(replace(RunConfig(), evaluations=0), clock=lambda: now[0]).spent() == ""
