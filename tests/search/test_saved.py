"""What a study keeps can be told from what became of it: steps, answers, the bank."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from methods.bank import Bank, DamagedEdit
from methods.method import Edit
from methods.policy import Decision, Policy
from methods.sealed import sealed, unsealed
from methods.typed import Count, WrongValue
from predictors.assumed import AssumedMap
from search.endings import status
from search.evaluate import KeptQuality
from search.files import Steps, mended
from search.finalists import Finalist
from search.maps import kept_fits
from search.prepare import Scores
from search.results import Answer, Export, answers, saved_answer, saved_config, saved_prepared, set_damaged_aside
from search.results import _keep as keep


def answer(objective: str = "0.6x", **other: Any) -> Answer:
    """An answer with one finalist, which meets the objective."""
    policy = Policy({"a": (Decision.of("rtn", format="w8a8-token"),)})
    finalist = Finalist("found", policy, False, 1.0, 0.9, 1.1, 0.5, 0.45, 0.55, 1.0, True, 100)
    fields: dict[str, Any] = {
        "objective": objective, "limit_ms": 1.2, "verdict": "met", "finalists": (finalist,), "chosen": 0, "simple": None,
        "difference": None, "shadow_price": 0.1, "predicted": {"kl": 0.1}, "predictor": None, "cost": {}, "versions": {},
    }  # fmt: skip
    return Answer(**{**fields, **other})


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a configuration and two answers, the one for 0.5x later."""
    (tmp_path / "config.toml").write_text('study = "before"\nresults = "/nowhere"\nlatency = "0.6x"\n')
    for objective in ("0.6x", "0.5x"):
        keep(tmp_path, answer(objective))
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("value", [{"a": [1, 2.5, math.inf, "ü"]}, {"b": {"2": 1, "10": 0}, "a": None}, {}])
def test_what_was_sealed_comes_back(value: dict[str, Any]) -> None:
    assert unsealed(sealed(value), "f") == value
    assert unsealed(json.dumps(value), "f") == value  # as earlier versions wrote it


def test_values_that_json_changes_are_sealed_as_it_gives_them_back() -> None:
    back = unsealed(sealed({"numbers": {2: (1, 2), 10: math.nan}, "path": 1e300}), "f")
    assert back["numbers"]["2"] == [1, 2] and math.isnan(back["numbers"]["10"])


@pytest.mark.parametrize(
    "damage", [lambda t: t.replace("1.25", "1.26"), lambda t: t.replace('"a"', '"b"'), lambda t: t[:-9], lambda t: "[]"]
)
def test_what_was_changed_is_found(damage: Callable[[str], str]) -> None:
    text = sealed({"a": 1.25})
    assert damage(text) != text
    with pytest.raises(WrongValue, match=r"f: (was changed: its checksum does not fit|not JSON|expected)"):
        unsealed(damage(text), "f")


def test_a_step_that_was_changed_is_computed_again(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    assert steps.made("map", "key", lambda: [1.5, 2.5]) == [1.5, 2.5]
    change(tmp_path / "map.json", "2.5", "3.5")
    assert steps.get("map", "key") is None
    assert steps.made("map", "key", lambda: [1.5, 2.5]) == [1.5, 2.5] == steps.get("map", "key")
    (tmp_path / "map.json").write_text(json.dumps({"key": "key", "value": 7}))  # of an earlier version
    assert steps.get("map", "key") == 7
    (tmp_path / "map.json").write_bytes(b"\xff\xfe")
    assert steps.get("map", "key") is None


KINDS = {
    "sensitivities": (Scores, {"kl": {"a": {"rtn": 0.5}}, "stderr": {"a": {"rtn": 0.1}}}, {"kl": {"a": {"rtn": None}}}),
    "quality": (KeptQuality, {"kl_each": [0.5, math.inf], "nll_each": [1.0, 2.0], "n_tokens": 8}, {"n_tokens": "8"}),
    "tasks": (Mapping[str, Mapping[str, float]], {"lambada": {"acc": 0.5}}, {"lambada": 0.5}),
    "evaluations": (Count, 7, -1),
}


@pytest.mark.parametrize(("kind", "value", "wrong"), KINDS.values(), ids=KINDS)
def test_a_step_whose_value_is_of_another_kind_is_computed_again(tmp_path: Path, kind: Any, value: Any, wrong: Any) -> None:
    """Files of earlier versions have no checksum, so that whatever was put into one is read."""
    steps = Steps(tmp_path)
    assert steps.made("s", "key", lambda: value, kind) == value == steps.get("s", "key", kind)
    other = {**value, **wrong} if isinstance(value, dict) else wrong
    for bad in (other, "text", [1], None):
        (tmp_path / "s.json").write_text(json.dumps({"key": "key", "value": bad}))
        assert steps.get("s", "key", kind) is None
    assert steps.made("s", "key", lambda: value, kind) == value


def test_a_map_of_another_kind_is_measured_again(tmp_path: Path) -> None:
    steps, map_ = Steps(tmp_path), AssumedMap(1.0, 0.5, 2.0, 0.9, 1.1).to_dict()
    blocks = {"blocks": 2, "saved_ms": 1.0, "lo": 0.5, "hi": 1.5, "predicted_ms": 1.0}
    fit = {
        "map": map_,
        "scales": {"grouped": 1.5},
        "dense_ms": [2.0, 1.0, 3.0],
        "dense_name": "dense",
        "tail": math.nan,
        "disturbance": "",
        "label": "measured",
        "blocks": blocks,
    }
    steps.put("m", "key", [fit])
    (found,) = kept_fits(steps, "m", "key") or ()
    assert found["dense_ms"] == (2.0, 1.0, 3.0) and found["map"] == map_ and math.isnan(found["tail"])
    changes: list[dict[str, Any]] = [{"dense_ms": [2.0, 1.0]}, {"scales": {"grouped": "x"}}, {"label": "guessed"}, {"map": {}}]
    changes += [{"map": {**map_, "b0": "1"}}, {"blocks": {**blocks, "hi": None}}, {"blocks": {"blocks": 2}}, {"tail": "1"}]
    for change_ in changes:
        steps.put("m", "key", [{**fit, **change_}])
        assert kept_fits(steps, "m", "key") is None, change_
    steps.put("m", "key", [{name: item for name, item in fit.items() if name != "blocks"}])  # of an earlier version
    assert kept_fits(steps, "m", "key") is not None


def test_a_prepared_study_that_was_changed_is_named(study: Path) -> None:
    Steps(study / "steps").put("prepared", "key", {"model": "m"})
    change(study / "steps" / "prepared.json", '"m"', '"n"')
    with pytest.raises(WrongValue, match=r"prepared\.json: was changed: its checksum does not fit; .*repeat `search run`"):
        saved_prepared(study)


def test_an_answer_that_was_changed_is_named_and_moved_aside_by_a_run(study: Path) -> None:
    change(study / "answers" / "0.6x.json", '"limit_ms": 1.2', '"limit_ms": 9.9')
    with pytest.raises(WrongValue, match=r"answers/0\.6x\.json: was changed: its checksum does not fit; "):
        saved_answer(study)
    said: list[str] = []
    set_damaged_aside(study, said.append)
    path = study / "answers" / "0.6x.json"
    assert said == [
        f"{path}: was changed: its checksum does not fit; it is moved to .damaged-0.6x.json: ask for that objective again to have "
        "its answer"
    ]
    assert (study / "answers" / ".damaged-0.6x.json").is_file() and list(answers(study)) == ["0.5x"]
    set_damaged_aside(study, said.append)
    assert len(said) == 1


def test_the_latest_answer_is_known_after_a_copy(study: Path) -> None:
    """Copying gives files other times, in any order."""
    os.utime(study / "answers" / "0.5x.json", (1, 1))
    assert list(answers(study)) == ["0.6x", "0.5x"] and saved_answer(study).objective == "0.5x"
    for name, at in (("0.6x", 20), ("0.5x", 10)):  # earlier versions go by the file's time
        path = study / "answers" / f"{name}.json"
        data = unsealed(path.read_text(), path)
        del data["written"], data["exports"]
        path.write_text(json.dumps(data))
        os.utime(path, (at, at))
    assert saved_answer(study).objective == "0.6x" and saved_answer(study).exports == ()


def test_a_study_is_where_its_folder_is(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_config(study).folder == study
    monkeypatch.chdir(study)
    assert saved_config(Path()).folder == study


def test_a_cache_that_is_not_here_is_this_machines_own(study: Path, tmp_path: Path) -> None:
    text = (study / "config.toml").read_text()
    (study / "config.toml").write_text(text + 'cache = "/home/somebody/else"\n')
    assert saved_config(study).cache == ""
    (study / "config.toml").write_text(text + f'cache = "{tmp_path}"\n')
    assert saved_config(study).cache == str(tmp_path)


@pytest.mark.parametrize(
    ("verdict", "exports", "expected"),
    (
        ("met", (), 0),
        ("met", (Export("gguf", "exports/gguf/k", True),), 0),
        ("met", (Export("gguf", "exports/gguf/k", True, "no"),), 4),
        ("met", (Export("dense", "exports/dense/k", False, "no"),), 0),
        ("unvalidated", (Export("gguf", "exports/gguf/k", True, "no"), Export("dense", "exports/dense/k", True)), 4),
        ("not met", (Export("gguf", "exports/gguf/k", True, "no"),), 1),
    ),
)
def test_the_exit_code_says_what_is_missing(study: Path, verdict: str, exports: tuple[Export, ...], expected: int) -> None:
    found = answer(verdict=verdict, exports=exports)
    assert status(found) == expected
    keep(study, found)
    assert answers(study)["0.6x"].exports == exports
    assert [item.format for item in found.missing] == [item.format for item in exports if item.problem]


def test_what_is_damaged_in_a_bank_is_deleted_at_once_and_the_step_repeated(tmp_path: Path) -> None:
    bank, decision, said = Bank(tmp_path), Decision("none"), list[str]()
    for site in "abcd":
        bank.put(site, decision, Edit())
    for site in "bd":
        path = bank.path(site, decision)
        path.write_bytes(path.read_bytes()[:-3])
    steps: list[list[str]] = []

    def step() -> int:
        steps.append([site for site in "abcd" if bank.has(site, decision)])
        for site in steps[-1]:
            bank.get(site, decision)
        return 7

    assert mended(step, said.append) == 7
    assert steps == [["a", "b", "c", "d"], ["a", "c"]]
    assert said == [f"{bank.path('b', decision)} and 1 more: damaged, made again"]


def test_a_disk_that_damages_what_it_is_given_is_an_error(tmp_path: Path) -> None:
    def step() -> int:
        (tmp_path / "a").write_text("made again")
        raise DamagedEdit(tmp_path / "a", "its checksum does not fit")

    with pytest.raises(DamagedEdit):
        mended(step, lambda text: None)
