"""Roles, sources and token sequences."""

import json

import pandas as pd
import pytest
import torch

from search.config import RunConfig
from search.data import (
    parse_sources,
    remove_shared_lines,
    roles_from_text,
    split_documents,
    tokenize,
)
from search.documents import TEXT, DataError, read_documents

SHARES = {"calibrate": 4, "search": 2, "validate": 2, "report": 2}


class WordTokenizer:
    """One id a word; optionally a beginning-of-sequence id."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [len(word) for word in text.split()]
        return {"input_ids": [self.bos_token_id, *ids] if self.bos_token_id is not None and add_special_tokens else ids}


def test_one_source_serves_all_roles_and_roles_may_differ() -> None:
    assert parse_sources(["a.txt"]) == dict.fromkeys(SHARES, "a.txt")
    assert parse_sources(["a.txt", "report=b.txt"]) == {**dict.fromkeys(SHARES, "a.txt"), "report": "b.txt"}
    assert parse_sources([]) == {}


def test_the_shipped_text_serves_all_roles_without_overlap() -> None:
    """A few hundred kilobytes of prose, code and dialogue, whose sources stand beside it."""
    assert RunConfig().data == ("shipped",) and parse_sources(RunConfig().data) == dict.fromkeys(SHARES, "shipped")
    documents = read_documents("shipped")
    assert 250_000 < sum(map(len, documents)) < 600_000
    listed = (TEXT / "README.md").read_text()
    assert all(file.name in listed for file in TEXT.glob("*.txt"))
    found = roles_from_text(dict.fromkeys(SHARES, "shipped"), WordTokenizer(), SHARES, 512, seed=0)
    assert {role: len(corpus.tokens) for role, corpus in found.items()} == SHARES
    parts = split_documents(documents, SHARES, seed=0)
    assert not set(parts["calibrate"]) & set(parts["report"]) and not found["report"].generated


def test_text_that_the_model_writes_is_asked_for_by_name_and_stands_alone() -> None:
    assert RunConfig(data=("generated",)).data == () and parse_sources(()) == {}
    with pytest.raises(DataError, match="all roles or of none"):
        read_documents(parse_sources(["a.txt", "report=generated"])["report"])


@pytest.mark.parametrize("specs", [["a", "b"], ["calibrate=a"], ["report=a", "report=b", "c"]])
def test_unclear_sources_are_refused(specs: list[str]) -> None:
    with pytest.raises(DataError):
        parse_sources(specs)


def test_roles_are_disjoint_and_in_proportion() -> None:
    documents = [f"document {i} " + "x" * 300 for i in range(200)]
    parts = split_documents(documents, SHARES, seed=3)
    assert sorted(d for part in parts.values() for d in part) == sorted(documents)
    sizes = {role: sum(map(len, part)) for role, part in parts.items()}
    assert sizes["calibrate"] == pytest.approx(2 * sizes["report"], rel=0.3)
    assert parts == split_documents(documents, SHARES, seed=3)


def test_one_long_text_is_cut_at_blank_lines() -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * 40 for i in range(400))
    parts = split_documents([text], SHARES, seed=0)
    assert all(parts.values())
    assert not set(parts["calibrate"]) & set(parts["report"])


@pytest.mark.parametrize("mark", ["\n", " ", ""])
def test_a_text_without_blank_lines_serves_all_roles_too(mark: str) -> None:
    """Cut after lines, else after words, else anywhere; nothing is lost but what stands where it was cut."""
    words = [f"{i:06d}" for i in range(30_000)]
    parts = split_documents([mark.join(words)], SHARES, seed=0)
    sizes = {role: sum(map(len, part)) for role, part in parts.items()}
    assert sizes["calibrate"] == pytest.approx(2 * sizes["report"], rel=0.3)
    found = [piece for part in parts.values() for piece in part]
    assert sum(map(len, found)) == pytest.approx(len(mark.join(words)), rel=1e-3)
    assert not mark or sorted(word for piece in found for word in piece.split()) == words


def test_lines_that_the_report_has_are_taken_from_the_other_roles() -> None:
    line = "this very long line stands in two corpora, word by word, and must not be calibrated on"
    texts = {"calibrate": [f"own\n{line}\nmore"], "report": [line]}
    cleaned = remove_shared_lines(texts)
    assert cleaned == {"calibrate": ["own\nmore"], "report": [line]}


def test_sequences_start_with_bos_where_the_tokenizer_adds_it() -> None:
    plain = tokenize(["a bb ccc dddd eeeee ffffff"], WordTokenizer(), 2, 3)
    assert plain.tolist() == [[1, 2, 3], [4, 5, 6]]
    with_bos = tokenize(["a bb ccc dddd"], WordTokenizer(bos=99), 2, 3)
    assert with_bos.tolist() == [[99, 1, 2], [99, 3, 4]]


def test_too_short_a_text_says_how_much_is_there(tmp_path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one two three\n\n" * 20)
    with pytest.raises(DataError, match=r"short.txt \(\w+\): the text is too short: \d+ tokens where \d+ are needed"):
        roles_from_text(dict.fromkeys(SHARES, str(path)), WordTokenizer(), dict.fromkeys(SHARES, 4), 32, seed=0)


def test_formats_of_files(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    pd.DataFrame({"text": ["p", "q"]}).to_parquet(tmp_path / "c.parquet")
    assert read_documents(str(tmp_path)) == ["plain", "one", "two", "p", "q"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"{broken", "not JSON lines"),
        ("x.parquet", b"nonsense", "cannot be read"),
        ("x.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(str(tmp_path / name))


def test_corpora_carry_hashes_of_their_tokens(tmp_path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"paragraph {i} " + " ".join(f"w{'o' * (i % 7)}rd" for _ in range(60)) for i in range(200)))
    corpora = roles_from_text(dict.fromkeys(SHARES, str(path)), WordTokenizer(), dict.fromkeys(SHARES, 4), 32, seed=0)
    assert {c.sha256 for c in corpora.values()} == {c.sha256 for c in corpora.values() if len(c.sha256) == 16}
    assert len({c.sha256 for c in corpora.values()}) == 4
    assert all(c.tokens.shape == torch.Size([4, 32]) and not c.generated for c in corpora.values())


def test_too_short_a_text_says_that_repetitions_count_once(tmp_path) -> None:
    path = tmp_path / "again.txt"
    path.write_text("the same line over and over, as long as it takes to be compared with others\n" * 4000)
    with pytest.raises(DataError, match=r"too short: \d+ tokens .* \(39\d\d of its 4000 lines repeat others and count once\)"):
        roles_from_text(dict.fromkeys(SHARES, str(path)), WordTokenizer(), dict.fromkeys(SHARES, 40), 32, seed=0)
