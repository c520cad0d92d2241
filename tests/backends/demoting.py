"""A client with a spill file, and the demotion of its pages, at a time that tests tell."""

from pathlib import Path

from tmem.backends import _native, tiering
from tmem.backends.demotion import Demotion, Marks
from tmem.backends.paths import SegmentPaths
from tmem.types import OID_SIZE, PAGE_SIZE

from .pages import stamp_of, stamped

OID = bytes(OID_SIZE)
MIB = 1 << 20


class Clock:
    """Time goes on by a hundredth of a second with each look, at first."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.look_s = 0.01

    def __call__(self) -> float:
        self.now_s += self.look_s
        return self.now_s


class Bench:
    """A segment of 8 MiB, its client with a spill file, and the demotion of it."""

    def __init__(self, segment: _native.Segment, directory: Path, size_bytes: int) -> None:
        self.segment = segment
        self.paths = SegmentPaths(Path(segment.path).name, Path(segment.path).parent)
        self.paths.state.mkdir(exist_ok=True)
        self.client = segment.client("guest")
        self.pool = self.client.new_pool(persistent=True)
        self.file = directory / "spill"
        tiering.assign(self.paths, segment, self.client, str(self.file), size_bytes)
        self.clock = Clock()
        self.demotion = Demotion(self.paths, segment, Marks(), self.clock)
        self.pages: dict[int, int] = {}

    def put(self, first: int, npages: int, version: int = 1) -> int:
        """Put pages one by one until one is refused; the number stored."""
        for index in range(first, first + npages):
            if not self.pool.put(OID, index, stamped(index << 8 | version), keep_old=True):
                return index - first
            self.pages[index] = version
        return npages

    def check(self) -> None:
        buffer = bytearray(PAGE_SIZE)
        for index, version in self.pages.items():
            assert self.pool.get(OID, index, buffer) == 1
            assert stamp_of(bytes(buffer)) == index << 8 | version

    def rounds(self, count: int = 10) -> None:
        for _ in range(count):
            self.demotion.round()
            self.clock.now_s += 1

    @property
    def free_share(self) -> float:
        return (self.segment.freeable_bytes() + self.segment.occupied[2]) / self.segment.limits[1]
