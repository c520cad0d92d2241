"""A segment that is full refuses writes with ENOSPC, and a refused write leaves the sector as it was."""

import errno
import random
from typing import TYPE_CHECKING

from tmem.types import PAGE_SIZE

from .conftest import Server, nbd

if TYPE_CHECKING:
    from collections.abc import Callable

    from tmem.backends import _native


def test_full_segment(make_server: "Callable[..., Server]", segment: "_native.Segment") -> None:
    client = segment.client("guest1")
    client.cap_bytes = 4 << 20
    server = make_server("guest1", 32 << 20)
    noise = random.Random(5)
    written: dict[int, bytes] = {}
    with server.client() as handle:

        def refused(data: bytes, page: int) -> bool:
            """Write; whether it was refused, for want of space and nothing else."""
            try:
                handle.pwrite(data, page * PAGE_SIZE)
            except nbd.Error as error:
                if error.errnum != errno.ENOSPC:
                    raise
                return True
            return False

        for page in range(server.export.size_bytes // PAGE_SIZE):
            data = noise.randbytes(PAGE_SIZE)
            if refused(data, page):
                break
            written[page] = data
        assert 512 < len(written) <= 1024
        # A page that is there is overwritten in place of the old one or refused with the old one kept.
        for page in random.Random(6).sample(sorted(written), 50):
            data = noise.randbytes(PAGE_SIZE)
            if not refused(data, page):
                written[page] = data
        for page, data in written.items():
            assert handle.pread(PAGE_SIZE, page * PAGE_SIZE) == data
        # A request of many pages that does not fit fails, and each of its pages is old or new.
        first = min(written)
        count = 64
        assert set(range(first, first + count)) <= written.keys()
        data = noise.randbytes(count * PAGE_SIZE)
        refused(data, first)
        for number in range(count):
            after = handle.pread(PAGE_SIZE, (first + number) * PAGE_SIZE)
            assert after in (written[first + number], data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
        # Room made is room used.
        handle.trim(count * PAGE_SIZE, first * PAGE_SIZE)
        handle.pwrite(data[: 8 * PAGE_SIZE], first * PAGE_SIZE)
    assert segment.check() == []
