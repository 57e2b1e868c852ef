"""A study's folder: who holds it, what a killed run left in it, and what may lie about in its configuration."""

from pathlib import Path

import pytest

from search.config import ConfigError, RunConfig, read_toml
from search.files import check_new_folder, check_place
from search.folder import LOCK, Busy, check_places, held, open_study


def config(folder: Path, **other: object) -> RunConfig:
    """A study `s` in a folder."""
    return RunConfig(**{"latency": "0.5x", "results": str(folder), "study": "s", **other})  # type: ignore[arg-type]


def test_a_study_is_held_until_it_is_left(tmp_path: Path) -> None:
    with open_study(config(tmp_path)) as folder:
        with pytest.raises(Busy, match=r"is held by process \d+ on .* since 20\d\d-") as busy, open_study(config(tmp_path)):
            pass
        assert "choose another --study" in str(busy.value)
    with pytest.raises(ZeroDivisionError), open_study(config(tmp_path)):
        raise ZeroDivisionError
    with held(folder):
        pass


def test_what_a_killed_run_left_is_gone_and_a_lock_alone_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "s" / "bank").mkdir(parents=True)
    (tmp_path / "s" / LOCK).touch()
    (tmp_path / "s" / "bank" / ".edit.safetensors.abc.part").write_text("half")
    with pytest.raises(ConfigError, match="no study"), open_study(config(tmp_path)):
        pass
    (tmp_path / "s" / "bank" / ".edit.safetensors.abc.part").rename(tmp_path / "s" / ".edit.abc.part")
    (tmp_path / "s" / "bank").rmdir()
    with open_study(config(tmp_path)) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["config.toml", LOCK]


def test_places_are_tried_and_left_as_they_are(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "b", tmp_path, tmp_path / "new"):
        check_place(path, "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").touch()
    check_place(tmp_path / "f", "--out")
    with pytest.raises(ConfigError, match=r"--out .*f/g/h: nothing can be written there \(.*f is a file\)"):
        check_place(tmp_path / "f" / "g" / "h", "--out")
    with pytest.raises(ConfigError, match="nothing can be written there"):
        check_place(Path("/proc/nowhere/deep"), "--out")
    (tmp_path / "d").mkdir()
    check_new_folder(tmp_path / "d", "--out")
    (tmp_path / "d" / "x").touch()
    for taken in ("d", "f"):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            check_new_folder(tmp_path / taken, "--out")


@pytest.mark.parametrize("name", ["steps", "bank", "models", "answers", "policies", "exports"])
def test_a_file_where_a_run_will_write_is_found_before_it_works(tmp_path: Path, name: str) -> None:
    with open_study(config(tmp_path)) as folder:
        check_places(config(tmp_path, export=("dense",)))
        (folder / name).touch()
        with pytest.raises(ConfigError, match=f"--results .*{name}.*: nothing can be written there"):
            check_places(config(tmp_path, export=("dense",)))


def test_a_password_is_not_written_down(tmp_path: Path) -> None:
    with open_study(config(tmp_path, store="postgresql+psycopg://me:se:cr@et@host:5432/db")) as folder:
        saved = read_toml(folder / "config.toml")
    assert "se:cr" not in (folder / "config.toml").read_text() and saved["store"] == "postgresql+psycopg://me@host:5432/db"
    with open_study(config(tmp_path, store="postgresql+psycopg://host/db")) as folder:
        assert read_toml(folder / "config.toml")["store"] == "postgresql+psycopg://host/db"


def test_a_configuration_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('latency = "0.5x"\nstorage = "sqlite:///a.db"\n')
    assert RunConfig(**read_toml(tmp_path / "config.toml")).store == "sqlite:///a.db"


def test_what_was_refused_leaves_no_folder_and_what_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), open_study(config(tmp_path)):
        raise ValueError("refused")
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="later"), open_study(config(tmp_path)) as folder:
        (folder / "steps").mkdir()
        raise ValueError("later")
    assert (folder / "steps").is_dir() and (folder / "config.toml").exists()
    with open_study(config(tmp_path, study="t")) as folder:
        pass
    with pytest.raises(ValueError, match="again"), open_study(config(tmp_path, study="t")):
        raise ValueError("again")
    assert (folder / "config.toml").exists()
