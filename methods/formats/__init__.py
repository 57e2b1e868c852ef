"""Number formats: names, codes, packing and the reference numerics of every format."""

from methods.formats.format import Format, parse_format

__all__ = ["Format", "parse_format"]
