"""Lengths of time as people write them."""

from __future__ import annotations

import re

from methods.typed import shown

LONGEST_S = 30 * 24 * 3600
"""A month."""

_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str, flag: str = "--budget") -> float:
    """Seconds of `90s`, `10m` or `1.5h`; raises ValueError, naming the flag, without a unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(s|m|min|h)?\s*", text)
    if not match:
        raise ValueError(f"{flag} {shown(text)}: not a time; write 90s, 10m or 2h")
    if match[2] is None:
        raise ValueError(f"{flag} {shown(text)} has no unit; write {match[1]}m, {match[1]}s or {match[1]}h")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"{flag} {shown(text)}: use a time above zero and up to {LONGEST_S // 3600}h")
    return seconds
