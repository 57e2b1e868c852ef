"""Content keys and the cached steps of a study."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from methods.atomic import write_bytes, write_text
from methods.errors import InputError
from methods.sealed import sealed, unsealed
from methods.typed import read
from search.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def content_key(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of JSON-serialisable parts."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_place(path: Path, flag: str, *, folder: bool = False) -> None:
    """Raises ConfigError where no file, or no `folder`, could be written at a path, by making and removing a file; leaves nothing.

    Work whose results go there is not begun.
    """
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        if (folder or nearest != path) and not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        if nearest == path and not nearest.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=nearest if nearest.is_dir() else nearest.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: nothing can be written there ({error.strerror}); choose another place") from None


def check_new_folder(path: Path, flag: str) -> None:
    """`check_place` for a folder that is to be made; raises ConfigError where something is there already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{flag} {path}: exists and is not empty; remove it or choose another folder")
    check_place(path, flag, folder=True)


Value = TypeVar("Value")


def kept_tensors(path: Path, make: Callable[[], Mapping[str, Tensor]], say: Callable[[str], None]) -> Mapping[str, Tensor]:
    """Tensors that are made once and kept at a path with their checksum; `say` is told where the file is damaged and made again."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    from methods.bank import tensors_digest

    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
                stored = (file.metadata() or {}).get("sha256")
            if stored in (None, tensors_digest("", found)):  # files of earlier versions carry none
                return found
        except SafetensorError:
            pass
        say(f"{path} is damaged: it is made again")
    made = make()
    write_bytes(path, save(dict(made), {"sha256": tensors_digest("", made)}))
    return made


def mended(step: Callable[[], Value], say: Callable[[str], None]) -> Value:
    """What a step gives; where it comes upon a damaged file of a bank, what is damaged there is deleted and the step repeated.

    It makes again what is missing then and finds most of what it had done. A file that is damaged again is an error: the disk does not
    keep what it is given.
    """
    from methods.bank import DamagedEdit, damaged_files

    deleted: set[Path] = set()
    while True:
        try:
            return step()
        except DamagedEdit as damage:
            if damage.path in deleted:
                raise
            found = {damage.path, *damaged_files(damage.path.parent.parent)}  # all at once: they are made in one sweep
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            say(f"{damage.path}{more}: damaged, made again")
            for path in found:
                path.unlink(missing_ok=True)
            deleted |= found


class Steps:
    """Results of finished steps, one JSON file each, found again by the content key of what they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, key: str, kind: Any = Any) -> Any | None:
        """The step's value if it was computed from the same inputs; a torn, changed or foreign file counts as absent.

        kind: of the value, as `methods.typed` reads it; a value of another kind counts as absent too.
        """
        path = self.folder / f"{name}.json"
        try:
            data = unsealed(path.read_bytes(), path)
            return read(kind, data.get("value"), path) if data.get("key") == key else None
        except (OSError, InputError):
            return None

    def made(self, name: str, key: str, compute: Callable[[], Value], kind: Any = Any) -> Value:
        """The step's value, computed and kept where it was not; `compute` returns what JSON gives back as it was.

        kind: as for `get`.
        """
        value: Value | None = self.get(name, key, kind)
        if value is None:
            value = compute()
            self.put(name, key, value)
        return value

    def put(self, name: str, key: str, value: Any) -> None:
        """Keep a step's value."""
        write_text(self.folder / f"{name}.json", sealed({"key": key, "value": value}))


def plain(value: Any) -> Any:
    """A value as JSON has it: without nan and infinities, keys as text, lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
