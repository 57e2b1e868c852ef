"""Writes that fail or are killed leave the old file, no part of a new one, and an error that names the file."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from methods.atomic import new_folder, remove_abandoned, set_aside, staging_folder, write_bytes, write_text
from methods.locks import try_lock, unlock


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "file.json"
    write_text(path, "old")
    monkeypatch.setattr("methods.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_bytes(path, b"new")
    assert raised.value.filename == str(path) and raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and names(path.parent) == ["file.json"]


def test_a_folder_that_a_library_could_not_fill_is_gone_and_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised, new_folder(tmp_path / "model") as staging:
        save_file({"w": torch.ones(3)}, staging / "missing" / "model.safetensors")
    assert raised.value.filename == str(tmp_path / "model") and names(tmp_path) == []
    with pytest.raises(RuntimeError, match="of its own"), new_folder(tmp_path / "model"):
        raise RuntimeError("an error of its own")
    assert names(tmp_path) == []


def test_a_new_folder_appears_whole_and_overwrites_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as staging:
        (staging / "part").write_text("1")
        assert not (tmp_path / "made").exists() and staging.name.startswith(".")
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["part"]
    with pytest.raises(FileExistsError, match="is not empty"), new_folder(tmp_path / "made"):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_and_folders_have_the_modes_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    """Whatever a library does: safetensors writes for its own account alone."""
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a" / "file.json", "text")
        with new_folder(tmp_path / "model") as staging:
            save_file({"w": torch.ones(3)}, staging / "model.safetensors")
            (staging / "below").mkdir(mode=0o700)
            (staging / "below" / "own").touch(mode=0o600)
            (staging / "run").touch(mode=0o700)
    finally:
        os.umask(before)
    model = tmp_path / "model"
    assert mode(model) == mode(model / "below") == 0o777 & ~mask
    files = tmp_path / "a" / "file.json", model / "model.safetensors", model / "below" / "own"
    assert [mode(path) for path in files] == [0o666 & ~mask] * 3
    assert mode(model / "run") == 0o700 | 0o666 & ~mask


def test_what_is_damaged_is_moved_aside_under_a_name_of_its_own(tmp_path: Path) -> None:
    for content in ("one", "two"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "file").write_text(content)
        set_aside(tmp_path / "model")
    assert names(tmp_path) == [".damaged-model", ".damaged-model-2"]
    assert [(tmp_path / name / "file").read_text() for name in names(tmp_path)] == ["one", "two"]
    assert remove_abandoned(tmp_path) == 0


def test_only_what_nobody_is_writing_is_removed(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".model.abc.part").mkdir(parents=True)
    (tmp_path / "deep" / ".model.abc.part" / "half").write_text("1")
    (tmp_path / ".bank.xyz.part").write_text("half")
    (tmp_path / ".hidden").write_text("not ours")
    (tmp_path / "visible.part").write_text("not ours")
    with staging_folder(tmp_path / "busy") as busy:
        (busy / "half").write_text("1")
        assert remove_abandoned(tmp_path) == 2
        assert (busy / "half").exists()
    assert names(tmp_path) == [".hidden", "deep", "visible.part"] and names(tmp_path / "deep") == []
    assert remove_abandoned(tmp_path / "nowhere") == 0


def test_a_lock_is_one_holders_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    one, other = (os.open(tmp_path / "lock", os.O_RDWR) for _ in range(2))
    try:
        assert try_lock(one) and not try_lock(other)
        unlock(one)
        assert try_lock(other)
    finally:
        os.close(one)
        os.close(other)
