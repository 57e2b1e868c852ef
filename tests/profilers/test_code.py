"""What makes a stored timing stale, and what does not."""

from pathlib import Path

import pytest

from profilers.kernels.code import code_of
from profilers.kernels.kernel import hash_of

KERNEL = '''"""A kernel."""

from __future__ import annotations

import torch
from profilers.target import (
    Target,
)

SOURCE = """
// kept: a string is code # here too
"""


def double(x):  # of anything
    """Twice x."""
    # slowly
    return x + x  # not 2 * x
'''
NATIVE = "#include <cmath>\n// twice\nfloat twice(float x) { /* no\nfma */ return x + x; }\n"


def written(folder: Path, text: str, suffix: str = ".py") -> str:
    path = folder / f"{len(list(folder.iterdir()))}{suffix}"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("profilers.target import (\n    Target,\n)", "profilers.devices.target import Target"),
        ('"""A kernel."""', '"""The kernel."""\n'),
        ("  # of anything", ""),
        ("    # slowly\n", "\n\n"),
        ('    """Twice x."""\n', ""),
    ],
)
def test_words_and_imports_leave_timings_valid(tmp_path: Path, old: str, new: str) -> None:
    changed = KERNEL.replace(old, new)
    assert changed != KERNEL
    assert hash_of(written(tmp_path, changed)) == hash_of(written(tmp_path, KERNEL))


@pytest.mark.parametrize(
    ("old", "new"), [("return x + x", "return 2 * x"), ("# here too", "# there"), ("def double", "def twice")]
)
def test_code_and_strings_in_it_make_timings_stale(tmp_path: Path, old: str, new: str) -> None:
    changed = KERNEL.replace(old, new)
    assert changed != KERNEL
    assert hash_of(written(tmp_path, changed)) != hash_of(written(tmp_path, KERNEL))


def test_comments_of_native_code_do_not_count(tmp_path: Path) -> None:
    assert code_of(written(tmp_path, NATIVE, ".cpp")) == "#include <cmath>\nfloat twice(float x) {  return x + x; }"
