"""Words of messages: long lists in few of them."""

from __future__ import annotations

from collections.abc import Iterable


def shortened(names: Iterable[object], most: int = 6) -> str:
    """The first names, with commas between them, and how many more there are."""
    found = [str(name) for name in names]
    more = len(found) - most
    return ", ".join(found) if more <= 1 else f"{', '.join(found[:most])} and {more} more"
