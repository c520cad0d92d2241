"""Two hosts in any order: what `test_coherence_model` does to two mounts, with a segment of its own for each
and servers between them. Nobody hears of the other's changes, as on a network file system."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis.stateful import initialize, precondition, rule

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.fs.beyond import Beyond
from tmem.fs.overlay import Overlay
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

from ..backends.tiers.servers import Server
from ..waiting import wait_until
from .test_coherence_model import PAGES, SHARED, SIDES, Machine, page_of, run

NAMES = ("a", "b")


@pytest.fixture
def segments(runtime_dir: Path) -> Iterator[list[_native.Segment]]:
    made = [_native.create(str(runtime_dir / name), 16 << 20) for name in NAMES]
    for segment in made:
        segment.client("web").authorise(SHARED.bytes)
    yield made
    for name, segment in zip(NAMES, made, strict=True):
        segment.close()
        _native.destroy(str(runtime_dir / name))


class Hosts(Machine):
    """The mounts are hosts."""

    address: RedisAddress
    sent_pages = 0
    hit_pages = 0

    def precache(self, side: int) -> Precache:
        return Precache(SegmentPaths.of(NAMES[side]), "web", SHARED)

    def overlay(self, side: int) -> Overlay:
        overlay = super().overlay(side)
        beyond = Beyond(self.address, SHARED, 0.0)  # their clocks are one
        wait_until(lambda: beyond.up)
        overlay.ask_beyond(beyond)
        return overlay

    def teardown(self) -> None:
        for overlay in self.overlays:
            assert overlay.beyond is not None
            counted = overlay.beyond.statistics()
            assert not counted.wrong_values
            Hosts.sent_pages += counted.sent_pages
            Hosts.hit_pages += counted.hit_pages
        super().teardown()

    @initialize()
    def find_something(self) -> None:
        """What one host has read the other finds at the servers: else nothing may ever be found there."""
        self.read_all(0)
        self.read_all(1)

    @precondition(lambda self: not self.stopped)
    @rule(side=SIDES)
    def read_all(self, side: int) -> None:
        """Open the file and read it in one go: so all of it may go to the servers, or come from there."""
        self.open(side)
        handle = self.handles.pop()

        async def work() -> bytes:
            found = await self.overlays[side].read(handle.fh, 0, PAGES * PAGE_SIZE)
            await self.overlays[side].release(handle.fh)
            return bytes(found)

        found = self.portal.call(work)
        for page in range(PAGES):
            assert page_of(found, page) in handle.file.allowed(side, page)
        beyond = self.overlays[side].beyond
        assert beyond is not None
        wait_until(lambda: not beyond._waiting)  # the other one may have it from there


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("kind", ["from open to open", "elsewhere"])
def test_what_is_promised_in_any_order(
    segments: list[_native.Segment], redis_server: Server, kind: str
) -> None:
    redis_server.ask("FLUSHALL")
    Hosts.watching, Hosts.shared, Hosts.segment = False, SHARED, segments[0]
    Hosts.elsewhere = kind == "elsewhere"
    Hosts.sent_pages = Hosts.hit_pages = 0
    Hosts.address = RedisAddress.parse(f"redis://{redis_server.address}/0?timeout=5")
    run(Hosts)
    assert Hosts.hit_pages > 0, f"{Hosts.sent_pages} pages were sent, and none was found"
    for segment in segments:
        assert segment.check() == []
