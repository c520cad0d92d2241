"""Block traces: CSV files with the columns version, time, op, size (bytes) and lbn (sectors of 512 bytes).

A cache is asked for pages, so each request becomes the pages of 4 KiB that it touches, in order; every
cache sees the same list. Reads and writes count alike, as in the published simulations of such traces.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
SECTOR_BYTES = 512
_SECTORS = PAGE_BYTES // SECTOR_BYTES

MAPPINGS = {
    "device": "pages of the device, from its first sector on",
    "aligned": "pages from where most requests begin: of the file system, if its partition is not aligned",
    "requests": "one page for each lbn, whatever the size: what simulators of objects do",
}


@dataclass(frozen=True)
class Trace:
    """What a trace asks for."""

    requests: int
    pages: Sequence[int]
    """Every access in order; numbers of pages."""
    footprint: int
    """Different pages."""


def _requests(path: Path) -> list[tuple[int, int]]:
    """Return (lbn, sectors) of each request. ValueError says what is wrong with the file."""
    found = []
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = {"version", "time", "op", "size", "lbn"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {sorted(missing)[0]!r}: "
                "the first line must be version,time,op,size,lbn"
            )
        for row in rows:
            try:
                lbn, size = int(row["lbn"]), int(row["size"])
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {rows.line_num}: size and lbn must be numbers") from None
            if lbn < 0 or size < 0:
                raise ValueError(f"{path}, line {rows.line_num}: size and lbn must not be negative")
            found.append((lbn, max(1, -(-size // SECTOR_BYTES))))
    if not found:
        raise ValueError(f"{path} has no requests")
    return found


def read(path: Path, mapping: str = "device") -> Trace:
    """Read a trace; `mapping` is one of MAPPINGS. ValueError says what is wrong with the file."""
    requests = _requests(path)
    if mapping == "requests":
        pages = [lbn for lbn, _ in requests]
    else:
        begin = 0
        if mapping == "aligned":
            ((begin, _),) = Counter(lbn % _SECTORS for lbn, _ in requests).most_common(1)
        pages = []
        for lbn, sectors in requests:
            first = lbn + _SECTORS - begin
            pages.extend(range(first // _SECTORS, (first + sectors - 1) // _SECTORS + 1))
    return Trace(len(requests), pages, len(set(pages)))
