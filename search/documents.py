"""The documents of a `--data` source: plain text, tables and JSON of many shapes, chats; what is no text is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from methods.errors import InputError
from search.words import shortened

SHIPPED = "shipped"
"""The source that comes with the package: `search/text`."""

WRITTEN = "generated"
"""The source of a model that reads no text: it writes its own."""

TEXT = Path(__file__).parent / "text"
"""Folder of the shipped text."""

SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Of files that are found in a folder. A file that is named and has another one is read as plain text."""

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]
"""The text of a conversation, whose messages have `role` and `content`; raises ValueError where it refuses one."""

_COLUMNS = ("text", "content", "page", "document")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
_CHATS = ("messages", "conversations", "conversation")
_TOKENS = ("input_ids", "tokens", "token_ids", "ids")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Roles as some data sets name them, and as chat templates do."""


class DataError(InputError):
    """Text that is missing, unreadable or too short; one line says how much there is and how much is needed."""


def plain_chat(messages: Sequence[Message]) -> str:
    """`role: text` lines, for models without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def chat_of(tokenizer: Any) -> Render:
    """The tokenizer's chat template, or `plain_chat` where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return plain_chat

    def render(messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
        except (TemplateError, TypeError) as error:
            raise ValueError(str(error)) from None

    return render


def read_documents(source: str, render: Render = plain_chat) -> list[str]:
    """The documents of a text file, table, JSON file, of a folder of them, of a hub data set `hf:NAME[:CONFIG[:SPLIT]]`, or shipped ones.

    render: of chats. Raises DataError for what is not there, cannot be parsed, or is no text.
    """
    if source == SHIPPED:
        return [file.read_text(encoding="utf-8") for file in sorted(TEXT.glob("*.txt"))]
    if source == WRITTEN:
        raise DataError(f"--data {WRITTEN}: a model writes the text of all roles or of none; leave the other sources out")
    if source.startswith("hf:"):
        return _hub_documents(source, render)
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        # Beside texts, a .json is a description of them.
        files = [p for p in found if p.suffix.lower() != ".json"] or found
        if not files:
            raise DataError(f"--data {source}: the folder holds no {', '.join(SUFFIXES)} file")
        return [document for file in files for document in _file_documents(file, render)]
    if not path.exists():
        raise DataError(f"--data {source}: no such file; give a {', '.join(SUFFIXES)} file, a folder or hf:NAME")
    return _file_documents(path, render)


def _file_documents(path: Path, render: Render) -> list[str]:
    kind = path.suffix.lower()
    try:
        if kind in (".parquet", ".csv", ".tsv"):
            rows = _table(path, kind)
        else:
            text = path.read_text(encoding="utf-8-sig")
            if kind not in (".json", ".jsonl", ".ndjson"):
                return _plain_text(text, path)
            rows = _json(text, path) if kind == ".json" else _json_lines(text, path)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"--data {path}: cannot be read as {kind or 'text'}: {error}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise DataError(f"--data {path}: cannot be read as {kind or 'text'}: {_line(error)}") from None
    return documents_of(rows, str(path), render)


def _plain_text(text: str, path: Path) -> list[str]:
    if "\0" in text:
        raise DataError(f"--data {path}: cannot be read as {path.suffix or 'text'}: it holds NUL bytes, as no text does")
    return [text]


def _table(path: Path, kind: str) -> list[Any]:
    import pandas as pd

    if kind == ".parquet":
        frame = pd.read_parquet(path)
    else:
        frame = pd.read_csv(path, sep="\t" if kind == ".tsv" else ",", encoding="utf-8-sig")
    return frame.to_dict("records")


def _json(text: str, path: Path) -> list[Any]:
    """An array, an object that holds one, a single row, or JSON lines under the wrong name."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if "Extra data" in str(error):
            return _json_lines(text, path)
        raise DataError(f"--data {path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        return found if isinstance(found, list) else [found]
    held = {name: value for name, value in found.items() if isinstance(value, list) and value}
    if len(held) == 1 and not set(held) & {*_CHATS, *_TOKENS}:
        return next(iter(held.values()))
    return held.get("data", [found])


def _json_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # other line separators may stand inside a JSON text
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"--data {path}: not JSON lines: line {number}: {error}") from None
    return rows


def _hub_documents(source: str, render: Render) -> list[str]:
    name, *rest = source[3:].split(":")
    try:
        from datasets import load_dataset

        data = load_dataset(name, *(rest[:1] or []), split=rest[1] if len(rest) > 1 else "train")
    except (ImportError, OSError, ValueError, RuntimeError, ConnectionError) as error:
        raise DataError(
            f"--data {source}: the hub data set cannot be loaded ({_line(error)}); give --data FILE instead"
        ) from None
    return documents_of([dict(row) for row in data], source, render)


def documents_of(rows: Sequence[Any], source: str, render: Render = plain_chat) -> list[str]:
    """The documents of rows: texts themselves, conversations, or objects with a column of either; rows without are left out.

    Raises DataError where the rows are something else, or nothing says which of several columns is the text.
    """
    texts = [row for row in rows if isinstance(row, str)]
    chats = [found for row in rows if (found := _messages(row)) is not None]
    objects = [row for row in rows if isinstance(row, Mapping)]
    written = texts + _rendered(chats, source, render) + (_from_objects(objects, source, render) if objects else [])
    documents = [document for document in written if document.strip()]
    if not documents:
        kinds = sorted({type(row).__name__ for row in rows if not isinstance(row, (str, Mapping))})
        what = f"its rows are {', '.join(kinds)}, not text" if kinds else "empty"
        raise DataError(f"--data {source}: {what}; give texts, or objects with a `text`")
    return documents


def _from_objects(rows: Sequence[Mapping[Any, Any]], source: str, render: Render) -> list[str]:
    """Of the first column that holds text: by its name, as a chat, as a pair, or because it is the only one."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(str(name), []).append(value)
    texts = [name for name, own in values.items() if 2 * len(own) > len(rows) and _mostly(own, lambda v: isinstance(v, str))]
    named = [name for name in _COLUMNS if name in texts] or (texts if len(texts) == 1 else [])
    if named:
        return [value for value in values[named[0]] if isinstance(value, str)]
    for name in _CHATS:
        chats = [chat for value in values.get(name, ()) if (chat := _messages(value)) is not None]
        if chats:
            return _rendered(chats, source, render)
    for pair in _PAIRS:
        if set(pair) <= set(texts):
            return [f"{row[pair[0]]}\n{row[pair[1]]}" for row in rows if all(isinstance(row.get(name), str) for name in pair)]
    ids = next((name for name in (*_COLUMNS, *_TOKENS) if _mostly(values.get(name, ()), _is_ids)), None)
    if ids is not None:
        raise DataError(f"--data {source}: the column `{ids}` holds lists of numbers, token ids perhaps; give the text itself")
    several = f"no column `text`, and several hold text: {shortened(texts)}; rename one" if texts else ""
    raise DataError(f"--data {source}: {several or f'no column `text`; it has {shortened(values)}'}")


def _mostly(values: Sequence[Any], holds: Callable[[Any], bool]) -> bool:
    """Whether something holds of most values that are there."""
    given = [value for value in values if value is not None and not (isinstance(value, float) and math.isnan(value))]
    return 2 * sum(map(holds, given)) > len(given)


def _is_ids(value: Any) -> bool:
    value = value.tolist() if hasattr(value, "tolist") else value
    return isinstance(value, list) and bool(value) and all(isinstance(item, (int, float)) for item in value)


def _messages(value: Any) -> list[dict[str, str]] | None:
    """A conversation in one form, whatever it calls roles and texts; None where the value is none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    found = []
    for item in value:
        if not isinstance(item, Mapping):
            return None
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str):
            return None
        found.append({"role": _ROLES.get(role, role), "content": _content(content)})
    return found


def _content(content: Any) -> str:
    """A message's text; of one in parts, those that are text."""
    content = content.tolist() if hasattr(content, "tolist") else content
    if isinstance(content, (list, tuple)):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, Mapping) and part.get("text"))
    return content if isinstance(content, str) else ""


def _rendered(chats: Sequence[Sequence[Message]], source: str, render: Render) -> list[str]:
    """Conversations as text, less those that the chat template refuses; raises DataError where it refuses all."""
    found, refused = [], ""
    for messages in chats:
        try:
            found.append(render(messages))
        except ValueError as error:
            refused = _line(error)
    if chats and not found:
        raise DataError(f"--data {source}: the tokenizer's chat template refuses its conversations: {refused}")
    return found


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
