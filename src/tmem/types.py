"""Constants and small value helpers that every layer shares."""

import re
from dataclasses import dataclass

from tmem.errors import TmemError

PAGE_SIZE = 4096
"""Bytes in a page, the unit of every put, get and flush."""

OID_SIZE = 24
"""Bytes in an object id (192 bits, as in tmem's ABI version 1)."""

MAX_INDEX = 2**32 - 1
"""The largest page index within an object."""

CODECS = ("auto", "lz4", "none")
"""How pages can be compressed."""

MOST_WEIGHT = 65535
"""The largest weight of a client."""

_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]/?#@\s]+)):(\d{1,5})")


@dataclass(frozen=True)
class SizeRange:
    """Between which sizes a segment may move; equal: it does not."""

    least_bytes: int
    most_bytes: int

    def __str__(self) -> str:
        """Return it as `parse_range` takes it."""
        if self.least_bytes == self.most_bytes:
            return str(self.most_bytes)
        return f"{self.least_bytes}..{self.most_bytes}"


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


def parse_range(text: str) -> SizeRange:
    """Return what a size such as ``4G``, or two such as ``1G..4G``, stand for.

    Raises `TmemError` for anything else, and for a range that ends before it begins.
    """
    least, dots, most = text.partition("..")
    sizes = SizeRange(parse_size(least), parse_size(most if dots else least))
    if sizes.least_bytes > sizes.most_bytes:
        raise TmemError(f"{text!r} begins with the larger size: write it as {most.strip()}..{least.strip()}")
    return sizes


_TIME = re.compile(r"(\d+)\s*([smhd])", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_S = 2**32 - 1


def parse_time(text: str) -> int:
    """Return the seconds that a time such as ``90s``, ``30m``, ``1h`` or ``2d`` stands for.

    Raises `TmemError` for anything else.
    """
    match = _TIME.fullmatch(text.strip())
    time_s = int(match[1]) * _SECONDS[match[2].lower()] if match else 0
    if not 0 < time_s <= _MOST_S:
        raise TmemError(f"{text!r} is not a time: write a whole number with s, m, h or d, such as 30m or 1h")
    return time_s


def format_size(size_bytes: int) -> str:
    """Return `size_bytes` as a person writes it: ``512M``, ``1.5G``; exact below 1 KiB."""
    value = float(size_bytes)
    for unit in ("B", "K", "M", "G"):
        if abs(value) < 1024:
            return f"{value:.0f}{unit}" if unit == "B" or value == int(value) else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"


def size_within(size_bytes: int) -> str:
    """Return the largest size of at most `size_bytes` in whole MiB (KiB), for people to type as it is."""
    return f"{size_bytes >> 20}M" if size_bytes >> 20 else f"{size_bytes >> 10}K"


def parse_host_port(text: str) -> tuple[str, int]:
    """Return the host and port that ``HOST:PORT`` or ``[IPV6]:PORT`` names; TmemError for anything else."""
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise TmemError(f"{text!r} is no address: write HOST:PORT, such as 0.0.0.0:10809 or [::1]:10809")
    return match[1] or match[2], int(match[3])
