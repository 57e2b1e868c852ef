"""Texts as people have them: every shape gives its documents, or is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from search.documents import DataError, chat_of, documents_of, read_documents
from tests.tiny import tiny_tokenizer

LINES = [f"line {i} of the text, which goes on" for i in range(6)]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]},
    {"role": "assistant", "content": "Because."},
]
PLAIN = "user: Why?\nassistant: Because."


def written(path: Path, value: Any) -> str:
    """A value in a file, by its suffix: JSON, lines of JSON, a table."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in value))
    elif path.suffix == ".json":
        path.write_text(json.dumps(value))
    elif path.suffix == ".parquet":
        pd.DataFrame(value).to_parquet(path)
    else:
        pd.DataFrame(value).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strings.jsonl", LINES),
        ("objects.ndjson", [{"id": i, "text": line} for i, line in enumerate(LINES)]),
        ("first_differs.jsonl", [{"meta": "header"}, *({"text": line} for line in LINES)]),
        ("nulls.jsonl", [{"text": row} for line in LINES for row in (None, line, "", 7)][:-1]),
        ("other_name.jsonl", [{"id": i, "sentence": line} for i, line in enumerate(LINES)]),
        ("array.json", [{"text": line} for line in LINES]),
        ("strings.json", LINES),
        ("held.json", {"version": 1, "data": [{"text": line} for line in LINES], "files": ["a"]}),
        ("one_list.json", {"version": 1, "rows": LINES}),
        ("column.json", {"text": LINES}),
        ("table.csv", {"text": LINES, "n": range(6)}),
        ("table.tsv", {"sentence": LINES}),
        ("one_column.parquet", {"sentence": LINES}),
        ("UPPER.JSONL", LINES),
    ],
)
def test_a_text_of_any_shape(tmp_path: Path, name: str, value: Any) -> None:
    path = Path(written(tmp_path / name.lower(), value)).rename(tmp_path / name)
    assert read_documents(str(path)) == LINES


def test_blank_rows_and_headings_are_rows_like_others(tmp_path: Path) -> None:
    rows = [row for line in LINES for row in ("", " = Head = \n", line)]
    assert read_documents(written(tmp_path / "t.parquet", {"text": rows})) == [row for row in rows if row]


@pytest.mark.parametrize(
    ("suffix", "column", "chat"),
    [
        (suffix, column, chat)
        for suffix in (".jsonl", ".json")
        for column in ("messages", "conversations", "")
        for chat in (CHAT, SHARED, PARTS)
    ]
    + [(".parquet", "messages", CHAT), (".parquet", "conversations", SHARED)],
)
def test_chats_are_conversations(tmp_path: Path, suffix: str, column: str, chat: list[Any]) -> None:
    rows = [{"id": "x", "kind": "y", column: chat} if column else chat] * 2
    assert read_documents(written(tmp_path / f"chat{suffix}", rows)) == [PLAIN] * 2


def test_a_chat_template_renders_them() -> None:
    tokenizer = tiny_tokenizer()
    assert chat_of(tokenizer)(CHAT) == PLAIN
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    assert documents_of([{"messages": CHAT}], "s", chat_of(tokenizer)) == ["<user>Why?</s><assistant>Because.</s>"]


def test_conversations_that_a_template_refuses_are_left_out_unless_it_refuses_all() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok"
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert documents_of([{"messages": system}, {"messages": CHAT}], "s", chat_of(tokenizer)) == ["ok"]
    with pytest.raises(DataError, match="--data s: the tokenizer's chat template refuses its conversations: no system role"):
        documents_of([{"messages": system}], "s", chat_of(tokenizer))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("numbers.jsonl", "1\n2\n", "its rows are int, not text"),
        ("null.jsonl", "null\n", "its rows are NoneType, not text"),
        ("tokens.jsonl", json.dumps({"text": [1, 2, 3]}), "column `text` holds lists of numbers, token ids perhaps"),
        ("ids.jsonl", json.dumps({"input_ids": [1, 2], "n": 2}), "column `input_ids` holds lists of numbers"),
        ("several.jsonl", json.dumps({"a": "x", "b": "y"}), "several hold text: a, b; rename one"),
        ("none.jsonl", json.dumps({"words": 1, "lines": 2}), "no column `text`; it has words, lines"),
        ("torn.json", '[{"text": "a"}', "not JSON"),
        ("torn.jsonl", '"a"\n{"text":', "not JSON lines: line 2"),
        ("number.json", "7", "its rows are int, not text"),
        ("empty.csv", "", "cannot be read as .csv"),
        ("numbers.csv", "a,b\n1,2\n", "no column `text`; it has a, b"),
        ("ragged.csv", "text\n1,2\n3,4,5,6\n", "cannot be read as .csv"),
        ("latin.txt", "d\xe9j\xe0 vu".encode("latin-1"), "save it as UTF-8"),
        ("binary.txt", b"a\0b", "NUL bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as error:
        read_documents(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_token_ids_in_a_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lists of numbers"):
        read_documents(written(tmp_path / "t.parquet", {"text": [[1, 2, 3]] * 3}))


def test_json_under_another_name_and_separators_inside_a_text(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}))
    assert read_documents(str(tmp_path / "lines.json")) == ["a", "b"]
    assert read_documents(written(tmp_path / "s.jsonl", ["one\u2028two\x85three"])) == ["one\u2028two\x85three"]
    (tmp_path / "bom.txt").write_bytes("\ufefftext".encode())
    assert read_documents(str(tmp_path / "bom.txt")) == ["text"]


def test_a_folders_descriptions_are_no_texts(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", LINES[:1])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read_documents(str(tmp_path)) == LINES[:1]
    (tmp_path / "a.jsonl").unlink()
    written(tmp_path / "b.json", LINES[1:2])
    (tmp_path / "dataset_info.json").unlink()
    assert read_documents(str(tmp_path)) == LINES[1:2]
