"""What the pages of a replay contain.

Traces say where was read, not what, and a compressing store must not be fed copies of one page. Pages are
cut from this machine's own programs, modules and texts, and dealt out by page number.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tmem.types import PAGE_SIZE

_PLACES = ("/usr/bin", "/usr/lib", "/usr/share", "/etc")
_PAGES_OF_A_FILE = 8
_SPREAD = 0x9E3779B97F4A7C15  # an odd number without pattern: neighbours get pages that are far apart


def _files(place: str) -> Iterator[Path]:
    for directory, below, names in os.walk(place):
        below.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield path


def collect(npages: int = 4096) -> list[bytes]:
    """Return up to `npages` pages, an equal part of each place; none of them repeats one word all through."""
    found: list[bytes] = []
    for number, place in enumerate(_PLACES, start=1):
        for path in _files(place):
            if len(found) >= npages * number // len(_PLACES):
                break
            try:
                with path.open("rb") as file:
                    data = file.read(_PAGES_OF_A_FILE * PAGE_SIZE)
            except OSError:
                continue
            for at in range(0, len(data) - PAGE_SIZE + 1, PAGE_SIZE):
                page = data[at : at + PAGE_SIZE]
                if page != page[:8] * (PAGE_SIZE // 8):
                    found.append(page)
    if not found:
        raise ValueError(f"there are no readable files in {', '.join(_PLACES)} to cut pages from")
    return found[:npages]


def page_of(number: int, pages: Sequence[bytes]) -> bytes:
    """Return the content of page `number`, always the same."""
    return pages[(number * _SPREAD >> 32 & 0xFFFFFFFF) % len(pages)]
