"""What hosts share through servers: names, what goes there and when, and servers that are slow or gone."""

import contextlib
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends.tiers.redis_url import RedisAddress
from tmem.fs.beyond import Beyond
from tmem.fs.identity import Content, Version, common_name
from tmem.types import PAGE_SIZE

from ..backends.tiers.servers import Cluster, Server
from ..waiting import wait_until

UUID = uuid.UUID("0123456789abcdef0123456789abcdef")
GROUP = 16 * PAGE_SIZE
SECOND = 10**9
OLD = Version(100 * SECOND, 200 * SECOND, 3 * GROUP + 5000)
NOW = 300 * SECOND
Host = Callable[..., Beyond]


@pytest.fixture
def host(redis_cluster: Cluster) -> Iterator[Host]:
    """A function that makes a host which is connected."""
    hosts: list[Beyond] = []

    def make(shared: uuid.UUID = UUID, url: str = "", now_ns: int = NOW, settled: float = 60.0) -> Beyond:
        address = RedisAddress.parse(url or redis_cluster.url, 0.25)
        hosts.append(Beyond(address, shared, settled, lambda: now_ns))
        if not url:
            wait_until(lambda: hosts[-1].up)
        return hosts[-1]

    yield make
    for one in hosts:
        one.close()


def content_of(version: Version = OLD, inode: int = 7, handle: bytes | None = b"handle") -> Content:
    return Content(common_name(handle, inode), version)


def some_bytes(length: int, seed: int = 1) -> bytes:
    """Bytes of which half compress."""
    rng = random.Random(seed)
    return b"".join(rng.randbytes(64) + bytes(64) for _ in range(length // 128 + 1))[:length]


def offer_all(one: Beyond, content: Content, data: bytes) -> None:
    before = one.statistics().sent_pages
    one.offer(content, 0, memoryview(data))
    wait_until(lambda: one.statistics().sent_pages - before == -(-len(data) // PAGE_SIZE))


def got(one: Beyond, content: Content, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    count = one.get(content, start, memoryview(buffer))
    assert not any(buffer[count:])
    return bytes(buffer[:count])


def test_one_finds_what_the_other_has_read(host: Host) -> None:
    data = some_bytes(OLD.size)
    one, two = host(), host()
    assert got(two, content_of(), 0, len(data)) == b""
    offer_all(one, content_of(), data)
    assert got(two, content_of(), 0, 4 * GROUP) == data
    assert got(two, content_of(), GROUP, GROUP) == data[GROUP : 2 * GROUP]
    assert got(two, content_of(), 5 * PAGE_SIZE, 40 * PAGE_SIZE) == data[5 * PAGE_SIZE : 45 * PAGE_SIZE]
    assert got(two, content_of(), 49 * PAGE_SIZE, PAGE_SIZE) == data[49 * PAGE_SIZE :]
    assert got(two, content_of(), 3 * GROUP, 2 * GROUP) == data[3 * GROUP :]
    assert got(two, content_of(), 60 * PAGE_SIZE, GROUP) == b""
    statistics = two.statistics()
    assert statistics.hit_pages == 50 + 16 + 40 + 1 + 2
    assert statistics.miss_pages == 50
    assert (statistics.wrong_values, statistics.failures) == (0, 0)


def test_other_versions_files_and_uuids_do_not_meet(host: Host) -> None:
    one, other = host(), host(uuid.UUID(int=5))
    offer_all(one, content_of(), some_bytes(OLD.size))
    later = OLD._replace(mtime_ns=OLD.mtime_ns + 1)
    changed = OLD._replace(ctime_ns=OLD.ctime_ns + 1)
    longer = OLD._replace(size=OLD.size + 1)
    for content in (
        content_of(later),
        content_of(changed),
        content_of(longer),
        content_of(handle=b"another"),
        content_of(handle=None),
    ):
        assert got(one, content, 0, GROUP) == b""
    assert got(other, content_of(), 0, GROUP) == b""
    assert got(one, content_of(inode=8), 0, GROUP) == some_bytes(OLD.size)[:GROUP]  # the handle says it


def test_only_whole_groups_go(host: Host) -> None:
    one = host()
    data = some_bytes(OLD.size)
    one.offer(content_of(), 5 * PAGE_SIZE, memoryview(data)[5 * PAGE_SIZE : 40 * PAGE_SIZE])
    wait_until(lambda: one.statistics().sent_pages == 16)
    assert got(one, content_of(), GROUP, GROUP) == data[GROUP : 2 * GROUP]
    assert got(one, content_of(), 0, GROUP) == b""
    assert got(one, content_of(), GROUP, 3 * GROUP) == data[GROUP : 2 * GROUP]  # up to what is not there
    one.offer(content_of(), 3 * GROUP, memoryview(data)[3 * GROUP : 3 * GROUP + 4000])  # cut short
    one.offer(content_of(), 3 * GROUP, memoryview(data)[3 * GROUP :])
    wait_until(lambda: one.statistics().sent_pages == 18)
    assert got(one, content_of(), 3 * GROUP, GROUP) == data[3 * GROUP :]


def test_young_versions_stay_here(host: Host) -> None:
    """Another host's change could carry the same stamps."""
    one = host(now_ns=200 * SECOND + 59 * SECOND)
    one.offer(content_of(), 0, memoryview(some_bytes(OLD.size)))
    touched = content_of(OLD._replace(mtime_ns=210 * SECOND, ctime_ns=10 * SECOND))
    two = host(now_ns=200 * SECOND + 61 * SECOND)
    two.offer(touched, 0, memoryview(some_bytes(OLD.size)))
    offer_all(two, content_of(inode=3, handle=None), some_bytes(OLD.size))
    assert one.statistics().sent_pages == 0
    assert two.statistics().sent_pages == 50
    assert got(two, content_of(), 0, GROUP) == b""
    assert got(two, touched, 0, GROUP) == b""


def test_wrong_values_are_misses(host: Host, redis_cluster: Cluster) -> None:
    one = host()
    data = some_bytes(8 * GROUP)
    content = content_of(OLD._replace(size=8 * GROUP))
    offer_all(one, content, data)
    stored = {}
    for server in redis_cluster.primaries():
        for name in server.ask("KEYS", "tmem:b:*"):  # type: ignore[attr-defined]
            stored[name] = (server, server.ask("GET", name))
    assert len(stored) == 8
    names = sorted(stored)
    rng = random.Random(4)

    def put(at: int, value: bytes) -> None:
        stored[names[at]][0].ask("SET", names[at], value)

    def value(at: int) -> bytes:
        found = stored[names[at]][1]
        assert isinstance(found, bytes)
        return found

    put(0, value(1))  # another group's
    put(1, value(1)[:-1])
    put(2, b"")
    put(3, rng.randbytes(5000))
    for at in (4, 5, 6, 7):
        flipped = bytearray(value(at))
        flipped[(3, 10, 40, len(flipped) // 2)[at - 4]] ^= 8
        put(at, bytes(flipped))
    for group in range(8):
        assert got(one, content, group * GROUP, GROUP) == b"", names[group]
    assert one.statistics().wrong_values == 8
    assert one.statistics().failures == 0


def test_too_much_is_left_out(host: Host, redis_cluster: Cluster) -> None:
    one = host()
    data = memoryview(some_bytes(64 * GROUP))
    for server in redis_cluster.servers:
        server.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        for n in range(20):  # 80 MiB
            one.offer(content_of(OLD._replace(size=64 * GROUP), inode=n, handle=None), 0, data)
        assert time.monotonic() - start < 10
    finally:
        for server in redis_cluster.servers:
            server.signal(signal.SIGCONT)
    assert one.statistics().dropped_pages >= 8 * 64 * 16


def test_servers_that_hang_are_stepped_around(host: Host, redis_cluster: Cluster) -> None:
    one = host()
    data = some_bytes(OLD.size)
    offer_all(one, content_of(), data)
    for server in redis_cluster.servers:
        server.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert got(one, content_of(), 0, GROUP) == b""
        assert time.monotonic() - start < 2  # once
        assert not one.up
        start = time.monotonic()
        for _ in range(1000):
            assert got(one, content_of(), 0, PAGE_SIZE) == b""  # short: to look at what is got takes longer
        assert time.monotonic() - start < 20  # a fifth of what each waiting would take
    finally:
        for server in redis_cluster.servers:
            server.signal(signal.SIGCONT)
    wait_until(lambda: one.up)
    wait_until(lambda: got(one, content_of(), 0, GROUP) == data[:GROUP])
    assert one.statistics().failures >= 1


def test_servers_that_were_never_there(host: Host) -> None:
    one = host(url="redis+cluster://127.0.0.1:1,127.0.0.1:2")
    two = host(url="redis://127.0.0.1:1")
    for each in (one, two):
        each.offer(content_of(), 0, memoryview(some_bytes(OLD.size)))
        assert got(each, content_of(), 0, GROUP) == b""
        assert not each.up
        assert each.statistics().dropped_pages == 50


def test_one_server_will_do(host: Host, redis_server: Server) -> None:
    redis_server.ask("FLUSHALL")
    one = host(url=f"redis://{redis_server.address}/0")
    wait_until(lambda: one.up)
    data = some_bytes(OLD.size)
    offer_all(one, content_of(), data)
    assert got(one, content_of(), 0, 4 * GROUP) == data


@contextlib.contextmanager
def strange_server() -> Iterator[tuple[int, list[socket.socket]]]:
    """A server that knows nobody's values, but numbers; its port, and who has come."""
    came: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as file:
            while (head := file.readline()).startswith(b"*"):
                words = [file.read(int(file.readline()[1:]) + 2) for _ in range(int(head[1:]))]
                connection.sendall(b":5\r\n" if words[0] == b"GET\r\n" else b"+OK\r\n")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                came.append(listening.accept()[0])
                threading.Thread(target=serve, args=(came[-1],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield listening.getsockname()[1], came
        listening.shutdown(socket.SHUT_RDWR)
    accepting.join()


def test_answers_that_are_no_values(host: Host) -> None:
    with strange_server() as (port, _):
        one = host(url=f"redis://127.0.0.1:{port}")
        wait_until(lambda: one.up)
        assert got(one, content_of(), 0, GROUP) == b""
        assert one.statistics().wrong_values == 1


def test_a_password_file_that_is_no_text_yet(host: Host, tmp_path: Path) -> None:
    """It is written anew in place, say; readers see nothing of it, and the servers are asked afterwards."""
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe")
    with strange_server() as (port, came):
        one = host(url=f"redis://127.0.0.1:{port}?password_file={file}")
        wait_until(lambda: came)
        wait_until(lambda: one._rest_seconds > 0.5, timeout_s=5, what="it rests until it tries again")
        file.write_text("secret")
        wait_until(lambda: one.up)
