"""Two mounts of one directory and somebody underneath, in any order, with operations that stop half way.

The model keeps every content that each file has ever had. Who has a file open may see, page by page, any of
them from the promised moment on: from the open (by anybody on the same mount), from the end of an own write,
and where changes are reported from the end of each change underneath. After every step all open files are
read on both mounts. Nothing sleeps: `pause` stops operations, and another process makes the changes
underneath.
"""

import itertools
import os
import shutil
import tempfile
import threading
from collections import namedtuple
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast
from uuid import UUID

import pyfuse3
import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tmem.backends.paths import SegmentPaths
from tmem.fs.fanotify import Events
from tmem.fs.openfile import Pause
from tmem.fs.overlay import Overlay, build
from tmem.fs.precache import Precache
from tmem.types import PAGE_SIZE

from . import underneath as other
from .test_interleavings import CONTEXT, Gate
from .underneath import Underneath

if TYPE_CHECKING:
    from tmem.backends import _native

T = TypeVar("T")
PAGES = 3
SHARED = UUID("0123456789abcdef0123456789abcdef")
SIDES = st.integers(0, 1)
PLACES = st.integers(0, PAGES - 1)
SIZES = st.sampled_from([0, 100, PAGE_SIZE, PAGE_SIZE + 1, PAGES * PAGE_SIZE])


WRITING = ["write:flushed", "write:written", "write:done"]
FIELDS = namedtuple(
    "FIELDS", "update_size update_mode update_uid update_gid update_atime update_mtime update_ctime"
)


def hold_up(overlay: Overlay, pause: Pause) -> None:
    """Have changes of names and attributes pause in their threads, before all else and after it."""
    names, contents = overlay.name_in_thread, overlay.change_in_thread

    def at(begun: str, done: str, work: Callable[..., T], *arguments: object) -> T:
        pause(begun)
        result = work(*arguments)
        pause(done)
        return result

    async def name(work: Callable[..., T], *arguments: object) -> T:
        return await names(at, "name:begun", "name:done", work, *arguments)

    async def content(work: Callable[..., T], *arguments: object) -> T:
        return await contents(at, "write:begun", "write:done", work, *arguments)

    overlay.name_in_thread, overlay.change_in_thread = name, content  # type: ignore[method-assign]


def page_of(content: bytes, page: int) -> bytes:
    return content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


@dataclass(eq=False)
class File:
    """One file, whatever its name is: its contents, the last one last."""

    contents: list[bytes]
    since: list[list[int]] = field(default_factory=lambda: [[0] * PAGES, [0] * PAGES])
    """For each mount and page the first content that it may show."""

    def becomes(self, content: bytes) -> None:
        self.contents.append(content)

    def written(self, offset: int, data: bytes) -> bytes:
        content = self.contents[-1].ljust(offset, b"\0")
        return content[:offset] + data + content[offset + len(data) :]

    def promise(self, side: int, *pages: int) -> None:
        for page in pages or range(PAGES):
            self.since[side][page] = len(self.contents) - 1

    def allowed(self, side: int, page: int) -> list[bytes]:
        return self.shown_since(page, self.since[side][page])

    def shown_since(self, page: int, first: int) -> list[bytes]:
        """Return what may be shown of a page from a content on: its size may be known before its bytes.

        Also a larger one, by an own write beyond the end that did not see what had changed underneath.
        """
        pages = [page_of(content, page) for content in self.contents[first:]]
        sizes = {len(each) for each in pages}
        return [content[:size].ljust(size, b"\0") for content in pages for size in sizes]


@dataclass(eq=False)
class Handle:
    side: int
    fh: int
    file: File


class Portal:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ended = trio.Event()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._ready.set()
            await self._ended.wait()

    def call(self, work: Callable[..., Awaitable[T]], *arguments: object) -> T:
        return trio.from_thread.run(work, *arguments, trio_token=self._token)

    def begin(self, work: Callable[..., Awaitable[T]], *arguments: object) -> Callable[[], T]:
        """Start it, and return a function that waits for its result."""
        results: list[T] = []
        done = threading.Event()

        async def run() -> None:
            try:
                results.append(await work(*arguments))
            finally:
                done.set()

        trio.from_thread.run_sync(self._nursery.start_soon, run, trio_token=self._token)

        def wait() -> T:
            assert done.wait(60), "it does not end"
            return results[0]

        return wait

    def close(self) -> None:
        trio.from_thread.run_sync(self._ended.set, trio_token=self._token)
        self._thread.join()


class Stopped:
    """An operation that waits at a gate; `finish` lets it go on and checks what comes of it."""

    def __init__(self, gate: Gate, finish: Callable[[], None]) -> None:
        self._gate = gate
        self._finish = finish

    def finish(self) -> None:
        self._gate.opened.set()
        self._finish()


class Machine(RuleBasedStateMachine):
    """The machine; the rest is set by the test."""

    watching: bool
    elsewhere: bool
    shared: UUID | None
    segment: "_native.Segment"
    underneath: Underneath
    portal: Portal

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="tmem-test-"))
        self.bytes = itertools.cycle(range(1, 256))
        content = self.data(PAGES * PAGE_SIZE)
        (self.root / "file").write_bytes(content)
        self.file = File([content])
        self.handles: list[Handle] = []
        self.stopped: list[Stopped] = []
        self.gates: list[Gate | None] = [None, None]
        self.overlays = [self.overlay(side) for side in (0, 1)]

    def precache(self, side: int) -> Precache:
        client = f"web{side}"
        if self.shared is not None:
            self.segment.client(client).authorise(self.shared.bytes)
        return Precache(SegmentPaths.of("default"), client, self.shared)

    def overlay(self, side: int) -> Overlay:
        def pause(point: str) -> None:
            gate = self.gates[side]
            if gate is not None:
                gate(point)

        root = os.open(self.root, os.O_RDONLY)
        overlay = build(root, self.precache(side), pause=pause, fine_stamps=True)
        if self.watching:
            overlay.watch_with(Events.of(overlay.table.root))
            assert overlay.watch is not None
        if self.elsewhere:
            overlay._is_local = False
        hold_up(overlay, pause)
        return overlay

    def teardown(self) -> None:
        for stopped in self.stopped:
            stopped.finish()
        for handle in self.handles:
            self.portal.call(self.overlays[handle.side].release, handle.fh)
        for overlay in self.overlays:
            overlay.close()
        shutil.rmtree(self.root)

    def data(self, size: int) -> bytes:
        return bytes([next(self.bytes)]) * size

    @precondition(lambda self: len(self.handles) < 4)
    @rule(side=SIDES)
    def open(self, side: int) -> None:
        async def work() -> int:
            entry = await self.overlays[side].lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
            return (await self.overlays[side].open(entry.st_ino, os.O_RDWR, CONTEXT)).fh

        self.file.promise(side)
        self.handles.append(Handle(side, self.portal.call(work), self.file))

    @precondition(lambda self: len(self.handles) > 1 and not self.stopped)
    @rule(number=st.integers(0, 3))
    def release(self, number: int) -> None:
        handle = self.handles.pop(number % len(self.handles))
        self.portal.call(self.overlays[handle.side].release, handle.fh)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, 3), page=PLACES)
    def write(self, number: int, page: int) -> None:
        handle = self.handles[number % len(self.handles)]
        data = self.data(PAGE_SIZE)
        self.portal.call(self.overlays[handle.side].write, handle.fh, page * PAGE_SIZE, data)
        handle.file.becomes(handle.file.written(page * PAGE_SIZE, data))
        handle.file.promise(handle.side, page)

    @precondition(lambda self: self.handles and len(self.stopped) < 2)
    @rule(number=st.integers(0, 3), page=PLACES, point=st.sampled_from(WRITING))
    def write_half(self, number: int, page: int, point: str) -> None:
        handle = self.handles[number % len(self.handles)]
        data = self.data(PAGE_SIZE)
        gate = self.arm(handle.side, point)
        wait = self.portal.begin(self.overlays[handle.side].write, handle.fh, page * PAGE_SIZE, data)
        assert gate.reached.wait(60)
        written = point != "write:flushed"
        if written:
            handle.file.becomes(handle.file.written(page * PAGE_SIZE, data))

        def finish() -> None:
            assert wait() == PAGE_SIZE
            if not written:
                handle.file.becomes(handle.file.written(page * PAGE_SIZE, data))
            handle.file.promise(handle.side, page)

        self.stopped.append(Stopped(gate, finish))

    @precondition(lambda self: self.elsewhere and len(self.stopped) < 2)
    @rule(
        side=SIDES, mode=st.sampled_from([0o600, 0o640]), point=st.sampled_from(["name:begun", "name:done"])
    )
    def chmod_half(self, side: int, mode: int, point: str) -> None:
        """Have a change begin before or end after what others do."""

        async def work() -> int:
            entry = await self.overlays[side].lookup(pyfuse3.ROOT_INODE, b"file", CONTEXT)
            wanted = pyfuse3.EntryAttributes()
            wanted.st_mode = mode
            fields = FIELDS(*(name == "update_mode" for name in FIELDS._fields))
            told = await self.overlays[side].setattr(
                entry.st_ino, wanted, cast("pyfuse3.SetattrFields", fields), None, CONTEXT
            )
            return told.st_mode & 0o777

        gate = self.arm(side, point)
        wait = self.portal.begin(work)
        assert gate.reached.wait(60)

        def finish() -> None:
            assert wait() == mode

        self.stopped.append(Stopped(gate, finish))

    @precondition(lambda self: self.handles and len(self.stopped) < 2)
    @rule(number=st.integers(0, 3), page=PLACES)
    def read_half(self, number: int, page: int) -> None:
        """Stop a read between the lower file and the pool, if it misses."""
        handle = self.handles[number % len(self.handles)]
        file, first = handle.file, handle.file.since[handle.side][page]
        gate = self.arm(handle.side, "read:lower-read")
        wait = self.portal.begin(self.page, handle, page)

        def finish() -> None:
            assert wait() in file.shown_since(page, first)

        while not gate.reached.wait(0.001):
            if self.is_over(wait):
                self.gates[handle.side] = None
                finish()
                return
        self.stopped.append(Stopped(gate, finish))

    @staticmethod
    def is_over(wait: Callable[[], object]) -> bool:
        done = next(
            cell.cell_contents
            for cell in wait.__closure__ or ()
            if isinstance(cell.cell_contents, threading.Event)
        )
        return bool(done.is_set())

    def arm(self, side: int, point: str) -> Gate:
        gate = Gate()
        gate.arm(point)
        self.gates[side] = gate
        return gate

    @precondition(lambda self: self.stopped)
    @rule(number=st.integers(0, 1))
    def go_on(self, number: int) -> None:
        self.stopped.pop(number % len(self.stopped)).finish()

    def changed(self, file: File, content: bytes) -> None:
        """Note a change underneath that is over."""
        file.becomes(content)
        if self.watching:
            for side in (0, 1):
                file.promise(side)

    @rule(page=PLACES, unnoticed=st.booleans())
    def write_underneath(self, page: int, unnoticed: bool) -> None:
        data = self.data(PAGE_SIZE)
        if unnoticed:
            data = data * PAGES
            self.underneath(other.write_unnoticed, self.root / "file", data)
            self.changed(self.file, self.file.written(0, data))
        else:
            self.underneath(other.write, self.root / "file", page * PAGE_SIZE, data)
            self.changed(self.file, self.file.written(page * PAGE_SIZE, data))

    @rule(size=SIZES)
    def truncate_underneath(self, size: int) -> None:
        self.underneath(os.truncate, self.root / "file", size)
        self.changed(self.file, self.file.contents[-1][:size].ljust(size, b"\0"))

    @rule(page=PLACES)
    def punch_underneath(self, page: int) -> None:
        self.underneath(other.punch, self.root / "file", page * PAGE_SIZE, PAGE_SIZE)
        content = self.file.contents[-1]
        hole = len(page_of(content, page))
        self.changed(self.file, self.file.written(page * PAGE_SIZE, bytes(hole)) if hole else content)

    @rule(size=SIZES)
    def replace_underneath(self, size: int) -> None:
        content = self.data(size)
        self.underneath(other.replace, self.root / "file", content)
        self.file = File([content])

    async def page(self, handle: Handle, page: int) -> bytes:
        return bytes(await self.overlays[handle.side].read(handle.fh, page * PAGE_SIZE, PAGE_SIZE))

    @invariant()
    def nothing_is_stale(self) -> None:
        async def work() -> list[tuple[Handle, int, bytes]]:
            return [
                (handle, page, await self.page(handle, page))
                for handle in self.handles
                for page in range(PAGES)
            ]

        for handle, page, content in self.portal.call(work):
            allowed = handle.file.allowed(handle.side, page)
            assert content in allowed, (
                f"mount {handle.side} shows page {page} as {content[:1]!r} * {len(content)} "
                f"instead of one of {[(each[:1], len(each)) for each in allowed]}"
            )


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("shared", [None, SHARED], ids=["own pools", "a shared pool"])
@pytest.mark.parametrize("kind", ["watching", "from open to open", "elsewhere"])
def test_what_is_promised_in_any_order(
    segment: "_native.Segment", tmp_path: Path, kind: str, shared: UUID | None
) -> None:
    watching = kind == "watching"
    if watching:
        directory = os.open(tmp_path, os.O_RDONLY)
        events = Events.of(directory)
        os.close(directory)
        if events is None:
            pytest.skip("the kernel reports no changes of this file system")
        events.close()
    Machine.watching, Machine.shared, Machine.segment = watching, shared, segment
    Machine.elsewhere = kind == "elsewhere"
    run(Machine)
    assert segment.check() == []


def run(machine: type[Machine]) -> None:
    """Try it out, of whatever kind it is."""
    machine.underneath = Underneath()
    machine.portal = Portal()
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            ),
        )
    finally:
        machine.portal.close()
        machine.underneath.close()


EXAMPLES = int(os.environ.get("TMEM_TEST_EXAMPLES", "15"))
