"""What a session makes of edits before they are judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from methods.method import Edit
from search.config import RunConfig
from search.progress import Progress
from search.session import Session
from tests.methods.test_halves import compressed
from tests.tiny import save_tiny


@pytest.mark.parametrize(
    ("runtime", "dtype", "rounds"),
    [
        ("llama.cpp", torch.bfloat16, True),
        ("auto-round", torch.bfloat16, True),
        ("vllm", torch.bfloat16, False),
        ("vllm", torch.float16, True),
        ("isolatency", torch.float16, False),
    ],
)
def test_scales_are_judged_as_the_runtimes_files_hold_them(
    runtime: str, dtype: torch.dtype, rounds: bool, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", dtype=dtype)
    config = RunConfig(model=str(folder), latency="0.7x", runtime=runtime, results=str(tmp_path), cache=str(tmp_path / "cache"))
    edit = Edit({"a": compressed("w8a8-g32", [0.05, 3e-5])})
    found = Session(config, Progress(quiet=True)).held(edit).linears["a"]
    scale = found.payload["scale"]
    assert torch.equal(scale.half().float(), scale.float()) == rounds
    assert torch.equal(found.dense, edit.linears["a"].dense) != rounds
