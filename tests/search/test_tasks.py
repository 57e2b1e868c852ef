"""Tasks of lm-eval: what names them, what is refused before anything is measured, and that no code of a file runs untrusted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from methods.policy import Policy
from search.config import RunConfig
from search.files import Steps
from search.finalists import Finalist
from search.progress import Progress
from search.run import _with_tasks, run_study
from search.tasks import TaskError, TaskFile, find_tasks, load_tasks, score_tasks
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

DOCUMENTS = [{"question": f"a b {'c ' * i}", "label": i % 2} for i in range(6)]


def task(
    folder: Path, name: str = "tiny_choice", file: str = "choice.yaml", more: str = "", choices: str = '["d", "e"]'
) -> Path:
    """A two-choice task on local data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    path = folder / file
    path.write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "data.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
{more}"""
    )
    return path


def marking(folder: Path, function: str = "process") -> Path:
    """A module whose import leaves a file; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "was_run"
    (folder / "utils.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef {function}(*a, **k): return a[0]\n")
    return mark


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("tiny", "tiny"),
        ('"tiny"', "tiny"),
        ("tiny  # of my own", "tiny"),
        ("no", "no"),
        ("1e3", "1e3"),
        ("0x1f", "0x1f"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_a_task_has_the_name_that_is_written(tmp_path: Path, written: str, name: str) -> None:
    (file,) = find_tasks([str(task(tmp_path, written))]).files
    assert file.name == file.values()["task"] == name


def test_a_task_is_scored_under_a_name_that_yaml_takes_for_a_truth_value(tmp_path: Path) -> None:
    found = find_tasks([str(task(tmp_path, "no"))])
    load_tasks(found)
    assert set(score_tasks(tiny_model("llama"), tiny_tokenizer(), found, 2)) == {"no"}


def test_a_local_task_file_is_scored_by_lm_eval(tmp_path: Path) -> None:
    """The score of a two-choice task is what the model's own likelihoods of the choices say."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    scores = score_tasks(model, tokenizer, find_tasks([str(task(tmp_path))]), limit=0)
    right = 0
    for document in DOCUMENTS:
        likelihoods = []
        for choice in ("d", "e"):
            context = tokenizer(document["question"].rstrip(), add_special_tokens=False)["input_ids"]
            ids = tokenizer(document["question"].rstrip() + " " + choice, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        right += likelihoods.index(max(likelihoods)) == document["label"]
    assert set(scores) == {"tiny_choice"}
    assert scores["tiny_choice"]["acc"] == pytest.approx(right / len(DOCUMENTS))


def hidden_in_an_include(folder: Path) -> list[str]:
    (folder / "base.yaml").write_text("include: deeper.yaml\n")
    (folder / "deeper.yaml").write_text("process_docs: !function utils.process\n")
    return [str(task(folder, more="include: base.yaml\n"))]


def hidden_in_a_group(folder: Path) -> list[str]:
    task(folder, "inner", "inner.yaml", "process_docs: !function utils.process\n")
    (folder / "middle.yaml").write_text("group: middle\ntask:\n  - inner\n")
    (folder / "group.yaml").write_text("group: outer\ntask:\n  - group: also\n    task: [middle]\n")
    return [str(folder / "group.yaml")]


def hidden_behind_a_tag(folder: Path) -> list[str]:
    task(folder, "inner", "inner.yaml", "tag: [mine]\nprocess_docs: !function utils.process\n")
    (folder / "group.yaml").write_text("group: outer\ntask: [mine]\n")
    return [str(folder / "group.yaml")]


def under_a_name_of_lm_evals(folder: Path) -> list[str]:
    task(folder, "arc_easy", "inner.yaml", "process_docs: !function utils.process\n")
    return ["arc_easy", str(task(folder))]


def a_class(folder: Path) -> list[str]:
    path = folder / "class.yaml"
    path.write_text("task: mine\nclass: !function utils.process\n")
    return [str(path)]


def in_the_middle(folder: Path) -> list[str]:
    return [str(task(folder, more="    aggregation: !function utils.process\n"))]


@pytest.mark.parametrize(
    "made", [hidden_in_an_include, hidden_in_a_group, hidden_behind_a_tag, under_a_name_of_lm_evals, a_class, in_the_middle]
)
def test_code_beside_a_task_file_does_not_run_untrusted(tmp_path: Path, made) -> None:
    mark = marking(tmp_path)
    tasks = made(tmp_path)
    with pytest.raises(TaskError, match=r"names the Python function utils\.process, which would run here.*--trust-tasks"):
        find_tasks(tasks)
    assert not mark.exists()
    assert find_tasks(tasks, trust=True).files
    assert not mark.exists()


def test_trusted_code_runs(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("def process(docs): return docs.select([0, 1])\n")
    found = find_tasks(
        [str(task(tmp_path, more="process_docs: !function utils.process\nmetadata: {version: 1}\n"))], trust=True
    )
    load_tasks(found)
    values = found.files[0].values()
    assert len(values["process_docs"].__module__) and values["task"] == "tiny_choice"


@pytest.mark.parametrize(
    ("more", "says"),
    [("    hf_evaluate: true\n", "hf_evaluate"), ("dataset_path: pandas\n", "reads pickles")],
)
def test_other_ways_to_code_are_refused_too(tmp_path: Path, more: str, says: str) -> None:
    path = task(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("dataset_path: json\n", more) if more.startswith("dataset") else text + more)
    with pytest.raises(TaskError, match=says):
        find_tasks([str(path)])


def test_a_template_is_no_way_into_python(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    path = task(tmp_path)
    attack = "{{ ''.__class__.__base__.__subclasses__() | length }}"
    path.write_text(path.read_text().replace("{{question}}", attack))
    with pytest.raises(TaskError, match="cannot be loaded: SecurityError"):
        load_tasks(find_tasks([str(path)]))
    assert not mark.exists()


def test_a_group_and_a_name_beside_it_are_found(tmp_path: Path) -> None:
    task(tmp_path, "inner", "inner.yaml")
    (tmp_path / "group.yaml").write_text("group: outer\ntask: [inner]\n")
    group = find_tasks([str(tmp_path / "group.yaml")])
    assert group.own and not find_tasks(["arc_easy", str(tmp_path / "group.yaml")]).own
    load_tasks(group)
    assert set(score_tasks(tiny_model("llama"), tiny_tokenizer(), group, 1)) >= {"inner"}
    assert [file.name for file in find_tasks(["inner", str(tmp_path / "group.yaml")]).files] == ["outer", "inner"]


def test_scores_depend_on_every_file_that_was_read(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("metadata: {version: 1}\n")
    path = str(task(tmp_path, more="include: base.yaml\n"))
    before = find_tasks([path]).texts
    (tmp_path / "base.yaml").write_text("metadata: {version: 2}\n")
    assert find_tasks([path]).texts != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("task: [a", "cannot be read as YAML"),
        ("- a\n- b\n", "not a YAML mapping"),
        ("dataset_path: json\n", "no `task:` names the task"),
        ("task: a\ninclude: nowhere.yaml\n", "no such file: .*nowhere.yaml"),
        ("task: a\ninclude: t.yaml\n", "includes itself"),
        (b"task: \xff\xfe", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_task_is_named(tmp_path: Path, content: str | bytes, says: str) -> None:
    (tmp_path / "t.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError, match=says):
        _ = find_tasks([str(tmp_path / "t.yaml")]).files[0].name


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (("{{question}}", "{{nothing}}"), "cannot be loaded: UndefinedError"),
        (("data.jsonl", "gone.jsonl"), "cannot be loaded: FileNotFoundError"),
        (("test_split: test", "test_split: train"), "cannot be loaded"),
        (
            ("output_type: multiple_choice", "output_type: multiple_choice\nunsafe_code: true"),
            "runs code that the model writes",
        ),
    ],
)
def test_a_task_is_loaded_and_not_only_named(tmp_path: Path, broken: tuple[str, str], says: str) -> None:
    path = task(tmp_path)
    path.write_text(path.read_text().replace(*broken))
    with pytest.raises(TaskError, match=says) as error:
        load_tasks(find_tasks([str(path)]))
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "search.tasks._manager", lambda folders, known: SimpleNamespace(all_tasks=["arc_easy"] if known else [])
    )
    with pytest.raises(TaskError, match=r"does not know x0, x1, x2, x3, x4, x5 and 14 more; `lm-eval ls tasks`"):
        load_tasks(find_tasks([f"x{i}" for i in range(20)]))


def test_aliases_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("task: a\nmetadata: &a\n  again: *a\n")
    assert TaskFile.read(tmp_path / "t.yaml").code is None


def test_tasks_that_fail_in_the_end_cost_the_scores_and_not_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TaskError("--tasks: cannot be scored: KeyError: 'gold'")

    monkeypatch.setattr("search.tasks.score_tasks", broken)
    dense = Finalist("dense", Policy(), True, 1, 1, 1, 1, 1, 1, 1, False, 10)
    config = RunConfig(latency="1x", tasks=(str(task(tmp_path)),))
    loaded, corpora = SimpleNamespace(digest="d", tokenizer=None), {"calibrate": SimpleNamespace(sha256="c")}
    session = SimpleNamespace(
        config=config,
        loaded=loaded,
        corpora=corpora,
        steps=Steps(tmp_path / "steps"),
        progress=Progress(quiet=True),
        model=None,
    )
    session.switch = SimpleNamespace(edits=lambda _: None)
    found, notes = _with_tasks(session, SimpleNamespace(edits=lambda _: {}), [dense], dense)  # type: ignore[arg-type]
    assert found == [dense] and not (tmp_path / "steps").exists()
    assert notes == (
        "no scores of tasks: --tasks: cannot be scored: KeyError: 'gold'; the same command tries them again, all else is kept",
    )


def test_tasks_are_loaded_before_anything_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(*_: object) -> None:
        raise AssertionError("prepared for tasks that cannot be loaded")

    monkeypatch.setattr("search.run.prepare_study", prepared)
    path = task(tmp_path)
    (tmp_path / "data.jsonl").unlink()
    config = RunConfig(
        model=str(save_tiny(tmp_path / "model")), latency="1x", tasks=(str(path),), results=str(tmp_path / "results")
    )
    with pytest.raises(TaskError, match="cannot be loaded: FileNotFoundError"):
        run_study(config, Progress(quiet=True))
