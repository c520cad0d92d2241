"""Constants and small value helpers that every layer shares."""

import re

from tmem.errors import TmemError

PAGE_SIZE = 4096
"""Bytes in a page, the unit of every put, get and flush."""

OID_SIZE = 24
"""Bytes in an object id (192 bits, as in tmem's ABI version 1)."""

MAX_INDEX = 2**32 - 1
"""The largest page index within an object."""

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``512M`` or ``4G`` stands for (powers of 1024).

    Raises `TmemError` for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise TmemError(f"{text!r} is not a size: write a whole number with K, M, G or T, such as 512M")
    return int(match[1]) << _UNITS[match[2].lower()]


def format_size(size_bytes: int) -> str:
    """Return `size_bytes` as a person writes it: ``512M``, ``1.5G``; exact below 1 KiB."""
    value = float(size_bytes)
    for unit in ("B", "K", "M", "G"):
        if abs(value) < 1024:
            return f"{value:.0f}{unit}" if unit == "B" or value == int(value) else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"
