"""JSON objects that carry their own checksum: what was changed after it was written is not taken for what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from methods.typed import WrongValue, json_of, read

_SEAL = "sha256"


def sealed(data: Mapping[str, Any]) -> str:
    """A JSON object as text that carries its own checksum under `sha256`."""
    body = json.loads(json.dumps(data))
    return json.dumps({**body, _SEAL: _digest(body)}, indent=1)


def unsealed(text: str | bytes, file: Path | str, way_out: str = "") -> dict[str, Any]:
    """The object of a text that `sealed` made, without its checksum; raises WrongValue, naming the file, where it is none or was changed.

    Files of earlier versions carry no checksum.
    """
    data = dict(read(dict[str, Any], json_of(text, file, way_out), file, way_out))
    stored = data.pop(_SEAL, None)
    if stored not in (None, _digest(data)):
        raise WrongValue(file, "", "was changed: its checksum does not fit", way_out)
    return data


def _digest(body: Mapping[str, Any]) -> str:
    """Of what JSON gives back, in its order: numbers, nan among them, are written as they are read."""
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()
