"""An export whose client is frozen or off: writes get ENOSPC and change nothing, all else goes on."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Server, refused

if TYPE_CHECKING:
    from tmem.backends import _native

SetMode = Callable[[str], None]


@pytest.fixture(params=["client", "segment"])
def set_mode(request: pytest.FixtureRequest, segment: "_native.Segment", swap_server: Server) -> SetMode:
    """A function that sets the mode of the server's client, or of everybody."""

    def set_it(mode: str) -> None:
        where = segment if request.param == "segment" else segment.client("guest1", create=False)
        where.mode = mode

    return set_it


@pytest.mark.parametrize("mode", ["frozen", "off"])
def test_writes_are_refused_and_the_rest_goes_on(
    swap_server: Server, segment: "_native.Segment", set_mode: SetMode, mode: str
) -> None:
    (pool,) = segment.client("guest1", create=False).pools()
    noise = random.Random(1)
    old, new = noise.randbytes(64 * PAGE_SIZE), noise.randbytes(64 * PAGE_SIZE)
    with swap_server.client() as client:
        client.pwrite(old, 0)
        set_mode(mode)
        assert refused(client.pwrite, new[:PAGE_SIZE], 0)
        assert refused(client.pwrite, new, 0)  # more than one page
        assert refused(client.pwrite, b"part of a page", 5 * PAGE_SIZE + 7)
        assert refused(client.pwrite, new[:PAGE_SIZE], 100 * PAGE_SIZE)  # nothing was there
        assert refused(client.zero, 100, 7 * PAGE_SIZE + 100)
        assert client.pread(64 * PAGE_SIZE, 0) == old
        assert client.pread(PAGE_SIZE, 100 * PAGE_SIZE) == bytes(PAGE_SIZE)
        client.trim(2 * PAGE_SIZE, 0)
        client.zero(PAGE_SIZE, 2 * PAGE_SIZE)
        client.flush()
        assert client.pread(64 * PAGE_SIZE, 0) == bytes(3 * PAGE_SIZE) + old[3 * PAGE_SIZE :]
        assert pool.statistics()["pages"] == 61
        set_mode("on")
        client.pwrite(new, 0)
        assert client.pread(64 * PAGE_SIZE, 0) == new
    assert segment.check() == []


def test_a_server_started_while_its_client_is_off(
    make_server: Callable[..., Server], segment: "_native.Segment"
) -> None:
    segment.client("guest1").mode = "off"
    server = make_server("guest1")
    with server.client() as client:
        assert refused(client.pwrite, b"x", 0)
        segment.client("guest1").mode = "on"
        client.pwrite(b"x", 0)
        assert client.pread(1, 0) == b"x"


def test_every_page_is_the_last_that_was_accepted(swap_server: Server, segment: "_native.Segment") -> None:
    """Modes change between the requests of a random run; a refused write changes nothing."""
    choice = random.Random(2)
    model = bytearray(32 * PAGE_SIZE)
    outcomes = {True: 0, False: 0}
    client = segment.client("guest1", create=False)
    with swap_server.client() as handle:
        for _ in range(600):
            if choice.random() < 0.2:
                where: Any = choice.choice([client, client, segment])
                where.mode = choice.choice(["on", "on", "frozen", "off"])
            start = choice.randrange(31 * PAGE_SIZE)
            size = choice.choice([1, 100, PAGE_SIZE])
            if choice.random() < 0.1:
                start = start // PAGE_SIZE * PAGE_SIZE
                handle.trim(PAGE_SIZE, start)
                model[start : start + PAGE_SIZE] = bytes(PAGE_SIZE)
                continue
            data = choice.randbytes(size)
            outcome = refused(handle.pwrite, data, start)
            outcomes[outcome] += 1
            # A refused write of two pages may have stored the first: each page is old or new.
            page = -(-start // PAGE_SIZE) * PAGE_SIZE
            if not outcome:
                model[start : start + size] = data
            elif start < page < start + size:
                first = bytes(handle.pread(page - start, start))
                assert first in (bytes(model[start:page]), data[: page - start])
                model[start:page] = first
            assert outcome is ({client.mode, segment.mode} != {"on"})
            assert handle.pread(size, start) == model[start : start + size]
        assert handle.pread(len(model), 0) == model
    assert min(outcomes.values()) > 50
    assert segment.check() == []
