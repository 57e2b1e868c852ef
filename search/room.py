"""What does not fit into this machine's memory is refused where the model is opened, before anything is computed."""

from __future__ import annotations

from methods.model.structure import Structure
from profilers.roofline import kv_bytes
from profilers.target import memory_bytes
from profilers.workload import Workload
from search.config import ConfigError, RunConfig


def check_texts(config: RunConfig, structure: Structure) -> None:
    """Raises ConfigError for so many tokens that their inputs of one block, which are held in fp32, do not fit."""
    for name in ("calibration_tokens", "search_tokens", "validation_tokens"):
        most = memory_bytes() // (4 * structure.d_model)
        if getattr(config, name) > most:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: the inputs of one block take {4 * structure.d_model} bytes a token, "
                f"and this machine has {memory_bytes() / 2**30:.1f} GiB; use fewer than {most}"
            )


def check_written(structure: Structure, prompt: int, tokens: int, width: int) -> None:
    """Raises ConfigError where the key/value cache of a prompt and `tokens` written after it does not fit; width: bytes of an element."""
    need = kv_bytes(structure, Workload(context=prompt + tokens), width)
    if need > memory_bytes():
        raise ConfigError(
            f"--tokens {tokens}: their keys and values take {need / 2**30:.1f} GiB, this machine has {memory_bytes() / 2**30:.1f}; "
            "write fewer"
        )
