"""Content keys and the cached steps of a study."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from methods.atomic import write_text


def content_key(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of JSON-serialisable parts."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Steps:
    """Results of finished steps, one JSON file each, found again by the content key of what they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, key: str) -> Any | None:
        """The step's value if it was computed from the same inputs; a torn or foreign file counts as absent."""
        try:
            data = json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return data.get("value") if isinstance(data, dict) and data.get("key") == key else None

    def latest(self, name: str) -> Any | None:
        """The step's value whatever it was computed from, for answers from a finished study."""
        try:
            data = json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return data.get("value") if isinstance(data, dict) else None

    def put(self, name: str, key: str, value: Any) -> None:
        """Keep a step's value."""
        write_text(self.folder / f"{name}.json", json.dumps({"key": key, "value": value}, indent=1))
