"""`InputError`: what came from outside cannot be used."""

from __future__ import annotations


class InputError(ValueError):
    """A file, flag or value from outside that cannot be used: one or two lines that say which, why, and the way out."""
