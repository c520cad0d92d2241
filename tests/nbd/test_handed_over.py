"""A client is handed over under its server: requests wait, and are answered here or never.

The steps of the handoff are taken by hand; what copies the pages is tested in ``tests/backends``.
"""

import errno
import os
import signal
import struct
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from tmem.backends.paths import SegmentPaths
from tmem.backends.supervisor import Supervisor
from tmem.nbd import server
from tmem.nbd.export import Export
from tmem.types import PAGE_SIZE

from ..backends.supervised import supervised
from ..waiting import DEADLINE_S
from .conftest import Server, eventually, nbd

if TYPE_CHECKING:
    from tmem.backends import _native

A_MOMENT_S = 0.3
"""How long something that must not happen is given to happen."""


class Request:
    """A request in a thread of its own, on a connection of its own."""

    def __init__(self, export: Export, what: str, *arguments: object) -> None:
        self.done = threading.Event()
        self.result: object = None
        self.errnum: int | None = None
        self._handle = nbd.NBD()
        self._handle.connect_uri(export.uri)
        self._thread = threading.Thread(target=self._run, args=(what, arguments))
        self._thread.start()

    def _run(self, what: str, arguments: tuple[object, ...]) -> None:
        try:
            self.result = getattr(self._handle, what)(*arguments)
        except nbd.Error as error:
            self.errnum = error.errnum
        self.done.set()

    @property
    def waits(self) -> bool:
        return not self.done.wait(A_MOMENT_S)

    def finish(self) -> None:
        """Wait until it has an outcome, and disconnect if there is still somebody."""
        assert self.done.wait(DEADLINE_S)
        self._thread.join()
        if self._handle.aio_is_ready():
            self._handle.shutdown()


@pytest.fixture
def client(swap_server: Server, segment: "_native.Segment") -> "_native.Client":
    return segment.client("guest1", create=False)


def test_writes_go_on_while_pages_are_copied(swap_server: Server, client: "_native.Client") -> None:
    with swap_server.client() as handle:
        client.handoff("copy")
        handle.pwrite(b"x" * PAGE_SIZE, 0)
        handle.trim(PAGE_SIZE, PAGE_SIZE)
        assert handle.pread(PAGE_SIZE, 0) == b"x" * PAGE_SIZE
        client.handoff("end")


@pytest.mark.parametrize("data", [b"new " * 1024, b"new", b"new " * (32 * 1024)])
def test_a_write_waits_for_the_end_of_the_freeze(
    swap_server: Server, segment: "_native.Segment", client: "_native.Client", data: bytes
) -> None:
    size = -(-len(data) // PAGE_SIZE) * PAGE_SIZE
    with swap_server.client() as handle:
        handle.pwrite(b"old " * (size // 4), 0)
        client.handoff("copy")
        client.handoff("freeze")
        request = Request(swap_server.export, "pwrite", data, 0)
        assert request.waits
        assert handle.pread(size, 0) == b"old " * (size // 4)  # others read meanwhile
        client.handoff("end")
        request.finish()
        assert request.errnum is None
        assert handle.pread(len(data), 0) == data
    assert segment.check() == []


@pytest.mark.parametrize("what", ["trim", "zero"])
def test_pages_are_dropped_meanwhile_and_the_copy_hears_of_it(
    swap_server: Server, client: "_native.Client", what: str
) -> None:
    """A flush is never refused and never waits; the page may not come back in the new place."""
    (pool,) = client.pools()
    with swap_server.client() as handle:
        handle.pwrite(b"x" * PAGE_SIZE, 0)
        client.handoff("copy")
        assert kinds(pool.export(changes=True)) == [0]
        client.handoff("freeze")
        getattr(handle, what)(PAGE_SIZE, 0)
        assert handle.pread(PAGE_SIZE, 0) == bytes(PAGE_SIZE)
        assert kinds(pool.export(changes=True)) == [3]  # absent
        client.handoff("end")


def kinds(exporter: "_native.Exporter") -> list[int]:
    """Return the kinds of the records that an exporter has."""
    buffer, found = bytearray(1 << 16), []
    while count := exporter.fill(buffer):
        at = 0
        while at < count:
            length, kind = struct.unpack_from("<HB", buffer, at + 28)
            found.append(kind)
            at += 32 + length
    return found


def test_the_one_who_froze_dies(swap_server: Server, segment: "_native.Segment") -> None:
    """Freezing ends with the thread that began it, so nobody waits for the dead."""
    frozen, may_end = threading.Event(), threading.Event()

    def freeze() -> None:
        client = segment.client("guest1", create=False)
        client.handoff("copy")
        client.handoff("freeze")
        frozen.set()
        may_end.wait(DEADLINE_S)

    thread = threading.Thread(target=freeze)
    thread.start()
    assert frozen.wait(DEADLINE_S)
    request = Request(swap_server.export, "pwrite", b"x", 0)
    assert request.waits
    may_end.set()
    thread.join()
    segment.reap()
    request.finish()
    assert request.errnum is None


@pytest.mark.parametrize(
    ("what", "arguments"),
    [("pwrite", (b"x" * PAGE_SIZE, 0)), ("pread", (PAGE_SIZE, 0)), ("trim", (PAGE_SIZE, 0))],
)
def test_after_the_departure_a_request_is_never_answered(
    swap_server: Server, client: "_native.Client", what: str, arguments: tuple[object, ...]
) -> None:
    with swap_server.client() as handle:
        handle.pwrite(b"old", 0)
        depart(client)
        request = Request(swap_server.export, what, *arguments)
        assert request.waits
        client.destroy()
        request.finish()
        assert request.errnum == errno.ENOTCONN  # libnbd's own: there was no reply
        assert swap_server.process is not None
        assert swap_server.process.wait(DEADLINE_S) == 0
        with pytest.raises(nbd.Error):  # the other connection has ended too
            handle.pread(1, 0)
    assert "the client is gone" in swap_server.log.read_text()


def test_a_request_after_the_end_is_not_answered_either(
    swap_server: Server, client: "_native.Client"
) -> None:
    """Not with an error either, which a kernel would take for a bad sector."""
    with swap_server.client() as handle:
        handle.pwrite(b"old", 0)
        depart(client)
        client.destroy()
        with pytest.raises(nbd.Error) as caught:
            handle.pread(3, 0)
        assert caught.value.errnum in (errno.ENOTCONN, errno.ECONNRESET)


def test_a_departure_that_failed_is_taken_back(swap_server: Server, client: "_native.Client") -> None:
    with swap_server.client() as handle:
        handle.pwrite(b"old", 0)
        depart(client)
        request = Request(swap_server.export, "pread", 3, 0)
        assert request.waits
        client.handoff("end")
        request.finish()
        assert request.result == b"old"
        handle.pwrite(b"new", 0)
        assert handle.pread(3, 0) == b"new"


def test_a_server_without_requests_ends_too(swap_server: Server, client: "_native.Client") -> None:
    with swap_server.client():
        depart(client)
        client.destroy()
        assert swap_server.process is not None
        assert swap_server.process.wait(DEADLINE_S) == 0


def depart(client: "_native.Client") -> None:
    for step in ("copy", "freeze", "depart"):
        client.handoff(step)


def test_no_server_for_a_client_that_departed_or_is_gone(
    swap_server: Server, client: "_native.Client", paths: SegmentPaths
) -> None:
    """Its address may be the new place's already: a start here must leave it alone."""
    swap_server.stop()
    address = paths.state / "guest1.sock"
    address.unlink()
    address.write_text("of the new place")
    depart(client)
    with pytest.raises(Exception, match="guest1 has been handed over: serve it at its new place"):
        server.serve(paths, swap_server.export)
    client.destroy()
    with pytest.raises(Exception, match="guest1"):
        server.serve(paths, swap_server.export)
    assert address.read_text() == "of the new place"


@pytest.mark.parametrize("end", ["destroyed", "departed"])
def test_the_supervisor_forgets_a_server_whose_client_left(
    paths: SegmentPaths, segment: "_native.Segment", caplog: pytest.LogCaptureFixture, end: str
) -> None:
    caplog.set_level("INFO", "tmem.backends.supervisor")
    client = segment.client("guest1")
    client.new_pool(persistent=True)
    export = Export("guest1", 1 << 20, unix=str(paths.state / "guest1.sock"))
    export.save(paths)

    async def body(supervisor: Supervisor) -> None:
        command = server.command(paths, "guest1")
        first = supervisor.supervise("swap-guest1", command, {}, client="guest1")
        assert first is not None
        await trio.to_thread.run_sync(server.wait_ready, export)
        kill(paths)
        while supervisor.statistics()[0].pid in (None, first):  # with the client there, it comes back
            await trio.sleep(0.01)
        await trio.to_thread.run_sync(server.wait_ready, export)
        depart(client)
        if end == "destroyed":
            client.destroy()
        else:
            kill(paths)
        while supervisor.statistics():
            await trio.sleep(0.01)

    supervised(paths, body)
    assert not list(paths.state.glob("service-*"))
    told = [record.getMessage() for record in caplog.records if "forgotten" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("swap-guest1: ended with status ")


def test_a_later_supervisor_forgets_what_left_meanwhile(
    paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    client = segment.client("guest1")
    client.new_pool(persistent=True)
    export = Export("guest1", 1 << 20, unix=str(paths.state / "guest1.sock"))
    export.save(paths)

    async def first(supervisor: Supervisor) -> None:
        supervisor.supervise("swap-guest1", server.command(paths, "guest1"), {}, client="guest1")
        await trio.to_thread.run_sync(server.wait_ready, export)

    async def second(supervisor: Supervisor) -> None:
        while supervisor.statistics():
            await trio.sleep(0.01)

    supervised(paths, first)
    depart(client)
    client.destroy()
    eventually(lambda: server.running(paths, "guest1") is None, "the server ends")
    assert list(paths.state.glob("service-*.json"))
    supervised(paths, second)
    assert not list(paths.state.glob("service-*"))


def kill(paths: SegmentPaths) -> None:
    """Kill the server of guest1."""
    process = server.running(paths, "guest1")
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
