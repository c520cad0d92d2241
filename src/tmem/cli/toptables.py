"""The tables of ``tmem top``: their columns, the keys that sort by them, and numbers in few characters.

A row is a dataclass of `sampling` or `mountwatch`; a table is a tuple of columns over one kind of row. The
key of a column is underlined in its heading, so it occurs there. Not for how a table is drawn (`topview`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tmem.cli.mountwatch import MountRow
from tmem.cli.sampling import ClientRow, Row


class Line(Protocol):
    """What every row has."""

    @property
    def name(self) -> str:
        """Whose it is, in the first column."""

    @property
    def state(self) -> str:
        """ "on", or what else is to be said of it."""

    @property
    def trouble(self) -> bool:
        """Whether it is red."""


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Column(Generic[L]):
    """A column of a table, and the key that sorts by it."""

    key: str
    heading: str
    value: Callable[[L], float | str]
    """What it sorts by; numbers sort the largest first."""
    text: Callable[[L], str]
    numeric: bool = True


def short(number: float | None) -> str:
    """Return a rate in at most four characters: ``0``, ``7.5``, ``123``, ``1.2k``, ``34M``."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            whole = number >= 99.5 or number == int(number)
            return f"{number:.0f}{unit}" if whole else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.0f}T"


def amount(size_bytes: float) -> str:
    """Return a size in at most five characters: ``0``, ``512B``, ``9.8K``, ``64M``, ``1.5G``."""
    for unit in ("B", "K", "M", "G"):
        if size_bytes < 999.5:
            plain = size_bytes >= 9.95 or size_bytes == int(size_bytes)
            return f"{size_bytes:.0f}{unit}" if plain else f"{size_bytes:.1f}{unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f}T"


def percent(share: float | None) -> str:
    """Return a share in percent: ``0.0`` to ``100.0``, ``-`` for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def duration(ns: float | None) -> str:
    """Return a time in at most five characters: ``850ns``, ``6.2us``, ``1.5s``; ``-`` for None."""
    if ns is None:
        return "-"
    for unit in ("ns", "us", "ms"):
        if ns < 999.5:
            return f"{ns:.0f}{unit}" if ns >= 9.95 or unit == "ns" else f"{ns:.1f}{unit}"
        ns /= 1000
    return f"{ns:.0f}s" if ns >= 9.95 else f"{ns:.1f}s"


def _share(key: str, heading: str, value: Callable[[L], float | None]) -> Column[L]:
    def sort(row: L) -> float:
        share = value(row)
        return -1 if share is None else share

    return Column(key, heading, sort, lambda row: percent(value(row)))


POOLS: tuple[Column[Row], ...] = (
    Column("c", "CLIENT", lambda row: row.name, lambda row: row.name, numeric=False),
    Column("t", "TYPE", lambda row: row.kind, lambda row: row.kind, numeric=False),
    Column("d", "DATA", lambda row: row.data_bytes, lambda row: amount(row.data_bytes)),
    Column("m", "MEMORY", lambda row: row.memory_bytes, lambda row: amount(row.memory_bytes)),
    Column("r", "RATIO", lambda row: row.ratio or 0, lambda row: f"{row.ratio:.2f}" if row.ratio else "-"),
    Column("p", "PUT/s", lambda row: row.puts_per_s or 0, lambda row: short(row.puts_per_s)),
    Column("g", "GET/s", lambda row: row.gets_per_s or 0, lambda row: short(row.gets_per_s)),
    _share("h", "HIT%", lambda row: row.hit_share),
    Column("e", "EVICT/s", lambda row: row.evictions_per_s or 0, lambda row: short(row.evictions_per_s)),
    Column("f", "REFUSED/s", lambda row: row.refused_per_s or 0, lambda row: short(row.refused_per_s)),
)
"""The last one has no room in 80 columns; a pool that is refused is red there instead."""


def _time(key: str, heading: str, value: Callable[[ClientRow], float | None]) -> Column[ClientRow]:
    return Column(key, heading, lambda row: value(row) or 0, lambda row: duration(value(row)))


CLIENTS: tuple[Column[ClientRow], ...] = (
    Column("c", "CLIENT", lambda row: row.name, lambda row: row.name, numeric=False),
    Column("p", "PUT/s", lambda row: row.puts_per_s or 0, lambda row: short(row.puts_per_s)),
    _time("5", "PUT50", lambda row: row.put_ns[0]),
    _time("t", "PUT99", lambda row: row.put_ns[1]),
    Column("g", "GET/s", lambda row: row.gets_per_s or 0, lambda row: short(row.gets_per_s)),
    _time("e", "GET50", lambda row: row.get_ns[0]),
    _time("9", "GET99", lambda row: row.get_ns[1]),
    _time("m", "MISS99", lambda row: row.missed_ns[1]),
)
"""Times that half of the pages, or 99 of 100, did not exceed: stored, got, and not there."""


def _bytes(key: str, heading: str, value: Callable[[MountRow], float | None]) -> Column[MountRow]:
    def text(row: MountRow) -> str:
        found = value(row)
        return "-" if found is None else amount(found)

    return Column(key, heading, lambda row: value(row) or 0, text)


MOUNTS: tuple[Column[MountRow], ...] = (
    Column("m", "MOUNT", lambda row: row.name, lambda row: row.name, numeric=False),
    Column("r", "READ/s", lambda row: row.reads_per_s or 0, lambda row: short(row.reads_per_s)),
    _share("h", "HIT%", lambda row: row.hit_share),
    _bytes("p", "POOL/s", lambda row: row.hit_bytes_per_s),
    _bytes("l", "LOWER/s", lambda row: row.lower_bytes_per_s),
    Column("i", "MISS/s", lambda row: row.misses_per_s or 0, lambda row: short(row.misses_per_s)),
    Column("e", "ERRORS", lambda row: row.errors or 0, lambda row: short(row.errors)),
    Column("c", "CLIENT", lambda row: row.client, lambda row: row.client, numeric=False),
)
"""Read requests, bytes from the pool and from the lower, pages that the pool did not have, and reads of the
lower that failed since it was mounted. The last one has no room in 80 columns."""
