"""What `serve.json` says of the key/value cache: flags by which an engine stores it as the policy decides, or why there are none.

Only flags that an engine's own documentation or source lists. vLLM's CPU build also accepts int8_per_token_head and the turboquant
types, and then computes something else without a word: they appear nowhere here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from methods.kv.format import CacheFormat


@dataclass(frozen=True)
class CacheFlags:
    """words: what is added to the engine's command, () for its own cache; differs: what is not as the policy decides, "" if nothing."""

    words: tuple[str, ...] = ()
    differs: str = ""


def with_cache(serve: Mapping[str, Any], fmt: CacheFormat | None, dtype: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The engines' entries with the flags of a cache format, and for `losses.json` what each does differently.

    fmt: None leaves everything as it is; dtype: the checkpoint's (`bf16`, …), which is what a cache without flags is stored in.
    """
    if fmt is None or fmt.dense == dtype:
        return dict(serve), []
    entries, losses = {}, []
    for engine, entry in serve.items():
        found = cache_flags(engine, fmt)
        entries[engine] = {**entry, "command": [*entry["command"], *found.words]} if found.words else dict(entry)
        if found.differs:
            losses.append({"lost": "cache", "why": f"{engine}: {found.differs}"})
    return entries, losses


def cache_flags(engine: str, fmt: CacheFormat) -> CacheFlags:
    """The flags of an engine of `serve.json` for a cache format."""
    found = _FLAGS.get(engine, _none)(fmt)
    return found or CacheFlags((), f"nothing in it stores keys and values as {fmt.name}; they stay in its own dtype")


def _simple(fmt: CacheFormat) -> bool:
    """Whether all past tokens are stored alike and as they are."""
    return not (fmt.rotated or fmt.smooth or fmt.window or fmt.sinks)


def _none(fmt: CacheFormat) -> CacheFlags | None:
    return None


def _vllm(fmt: CacheFormat) -> CacheFlags | None:
    if fmt.kind == "fp8" and fmt.scale == "token" and _simple(fmt):
        return CacheFlags(
            ("--kv-cache-dtype", "fp8_per_token_head"),
            "scales are kept in fp32, and the tokens of the call at hand are rounded too",
        )
    return _vllm_dense(fmt)


def _vllm_cpu(fmt: CacheFormat) -> CacheFlags | None:
    if fmt.kind == "fp8" and fmt.scale == "token" and _simple(fmt):
        return CacheFlags(("--kv-cache-dtype", "fp8"), "E4M3 with the scale 1 for everything, instead of one a token and head")
    return None


def _vllm_dense(fmt: CacheFormat) -> CacheFlags | None:
    name = {"bf16": "bfloat16", "fp16": "float16"}.get(fmt.dense)
    return CacheFlags(("--kv-cache-dtype", name)) if name else None


def _llama_cpp(fmt: CacheFormat) -> CacheFlags | None:
    if fmt.dense:
        name = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[fmt.dense]
        return CacheFlags(("-ctk", name, "-ctv", name))
    keys, values = (_LLAMA_TYPES.get(bits) for bits in (fmt.key_bits, fmt.value_bits))
    if fmt.kind != "int" or fmt.group != 32 or not _simple(fmt) or keys is None or values is None:
        return None
    differs = "scales are fp16, q8_0 has no offsets" if "q8_0" in (keys, values) else "scales and offsets are fp16"
    # Quantised values are read by its flash attention alone.
    return CacheFlags(
        ("-ctk", keys, "-ctv", values, "-fa", "on"), f"{differs}, and the tokens of the call at hand are rounded too"
    )


_LLAMA_TYPES = {8: "q8_0", 4: "q4_1"}
"""Blocks of 32 channels, by bits."""

_FLAGS = {"vllm": _vllm, "vllm-cpu": _vllm_cpu, "llama.cpp": _llama_cpp}


def transformers_entry(dtype: str, arguments: str = "") -> dict[str, Any]:
    """How transformers runs a folder, `.`, in the dtype of the checkpoint (`bf16`, …); it decodes weights, so that nothing is faster."""
    return {"python": f"AutoModelForCausalLM.from_pretrained('.', dtype='{_NAMES[dtype]}'{arguments})", "faster": False}


def vllm_entries(dtype: str, cpu: bool) -> dict[str, Any]:
    """How vLLM runs a folder, `.`: its CUDA build, and where its kernels for the CPU know all formats that one, too."""
    command = ["vllm", "serve", ".", "--dtype", _NAMES[dtype]]
    # By default the 4-bit kernels of the CPU build round activations to 8 bits as well, which is not the format that was evaluated.
    on_cpu = {"vllm-cpu": {"command": list(command), "env": {"VLLM_CPU_INT4_W4A8": "0"}}}
    return {"vllm": {"command": command}, **(on_cpu if cpu else {})}


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
