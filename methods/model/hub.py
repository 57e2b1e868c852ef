"""Models on the hub: what is fetched of them, what its cache on this machine holds, and what a snapshot there lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from methods.errors import InputError
from methods.model.quiet import quiet
from methods.model.tokenizer import TOKENIZER_FILES
from methods.model.weight_files import LoadError, listed

CONFIG = "config.json"
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""What is fetched, of the top folder."""


def fetch(name: str, log: Callable[[str], None], check: Callable[[Path], object]) -> Path:
    """The snapshot of a model's main revision, fetched unless it is cached.

    check: raises for a folder with the config.json of a model that is refused; it is asked before anything else is fetched. Raises
    LoadError where the model is neither there nor whole in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    log(f"fetching {name} from the hub, unless it is cached")
    told = configured(name)
    if told is not None and missing_files(told):
        check(told)
    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=["*/*"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        folder = cached(name)
        missing = "" if folder is None else missing_files(folder)
        if folder is not None and not missing:
            log(f"the hub does not give {name} ({type(error).__name__}): taken from its cache, {folder}")
            return folder
        if missing:
            raise LoadError(
                f"{name}: the hub does not give it ({type(error).__name__}), and its cache {folder} lacks {missing}; "
                "fetch it where there is a network"
            ) from error
        raise LoadError(
            f"{name}: no local folder of that name, and the hub does not give it ({type(error).__name__}); "
            "check the name and the network, or give a folder, a .gguf file or package:NAME"
        ) from error


def configured(name: str) -> Path | None:
    """The snapshot with a model's config.json, a few kB, fetched unless it is cached; None where it cannot be had.

    Raises LoadError for a repository without one: it holds no model of its own.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

    try:
        with quiet():
            return Path(hf_hub_download(name, CONFIG)).parent
    except RemoteEntryNotFoundError as error:
        raise LoadError(
            f"{name}: no {CONFIG} on the hub; give a repository with {CONFIG}, *.safetensors and a tokenizer's files, of an adapter or a "
            "GGUF the model it is of"
        ) from error
    except (OSError, HfHubHTTPError, HFValidationError):
        return cached(name)


def cached(name: str) -> Path | None:
    """The snapshot that the hub's cache has of a model's main revision, complete or not, whoever put it there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, CONFIG)
    except ValueError:  # no name of a repository
        return None
    return Path(config).parent if isinstance(config, str) else None


def missing_files(folder: Path) -> str:
    """What a snapshot lacks to be a model, "" where it lacks nothing: other tools fetch other files, and some list more than they fetch."""
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(listed(index)) if index.is_file() else set()
    except InputError:
        return index.name
    found = {path.name for path in folder.iterdir() if path.is_file()}
    if lacking := sorted(map(str, shards - found)):
        return f"{lacking[0]} ({len(lacking)} of {len(shards)} files of weights)"
    if not any(name.endswith(".safetensors") for name in found):
        return "weights as safetensors"
    return "" if found & set(TOKENIZER_FILES) else "a tokenizer"
