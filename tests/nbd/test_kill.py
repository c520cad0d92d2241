"""nbdkit dies by SIGKILL and comes back: what was acknowledged is there, for the same and for new clients."""

import contextlib
import random
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tmem.errors import PoolError
from tmem.types import OID_SIZE, PAGE_SIZE

from .conftest import Server, eventually, nbd

if TYPE_CHECKING:
    from collections.abc import Callable

    from tmem.backends import _native

DEPTH = 16
NPAGES = 1024


@contextlib.contextmanager
def fio(server: Server, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Run fio on 8 MiB of the export; it does not outlive the block."""
    command = [
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.export.uri}", "--randseed=7", "--bs=4k"),
        *("--rw=randwrite", "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--iodepth=16"),
        *("--buffer_compress_percentage=60", "--output-format=terse", *options),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_killed_under_fio_verify(swap_server: Server, segment: "_native.Segment") -> None:
    with fio(swap_server, "--do_verify=0") as whole:
        output, _ = whole.communicate(timeout=60)
        assert whole.returncode == 0, output
    (pool,) = segment.client("guest1").pools()
    for _ in range(2):
        seen = pool.statistics()["puts"] + 3000
        with fio(swap_server, "--do_verify=0", "--time_based", "--runtime=60") as again:
            eventually(lambda wanted=seen: pool.statistics()["puts"] > wanted, "fio writes")  # type: ignore[misc]
            swap_server.kill()
            again.communicate(timeout=60)
            assert again.returncode != 0
        swap_server.start()
        with fio(swap_server, "--verify_only") as check:
            output, _ = check.communicate(timeout=60)
            assert check.returncode == 0, output
    segment.reap()
    assert segment.check() == []


def content(page: int, version: int) -> bytes:
    """Two fifths noise, no two alike."""
    noise = random.Random(page * 1_000_003 + version).randbytes(1600)
    return page.to_bytes(8, "little") + version.to_bytes(8, "little") + noise + bytes(PAGE_SIZE - 1616)


def test_every_acknowledged_write_is_there(swap_server: Server, segment: "_native.Segment") -> None:
    choice = random.Random(8)
    acknowledged = dict.fromkeys(range(NPAGES), 0)
    issued = dict(acknowledged)
    for _ in range(3):
        killed_after = choice.randrange(300, 2500)
        write_until_killed(swap_server, choice, killed_after, issued, acknowledged)
        swap_server.start()
        with swap_server.client() as client:
            for page in range(NPAGES):
                found = client.pread(PAGE_SIZE, page * PAGE_SIZE)
                version = int.from_bytes(found[8:16], "little")
                assert acknowledged[page] <= version <= issued[page]
                assert found == (content(page, version) if version else bytes(PAGE_SIZE))
                acknowledged[page] = issued[page] = version
    segment.reap()
    assert segment.check() == []


def write_until_killed(
    server: Server,
    choice: random.Random,
    killed_after: int,
    issued: dict[int, int],
    acknowledged: dict[int, int],
) -> None:
    """Keep DEPTH writes under way, at most one per page, and kill the server in the midst of them."""
    handle = nbd.NBD()
    handle.connect_uri(server.export.uri)
    under_way: dict[int, tuple[int, int, Any]] = {}
    done = 0
    # ENOTCONN and the like: the server is gone, which is what the test is about.
    with contextlib.suppress(nbd.Error):
        while True:
            while len(under_way) < DEPTH:
                page = choice.randrange(NPAGES)
                if any(page == other for other, _, _ in under_way.values()):
                    continue
                issued[page] += 1
                buffer = nbd.Buffer.from_bytearray(bytearray(content(page, issued[page])))
                under_way[handle.aio_pwrite(buffer, page * PAGE_SIZE)] = (page, issued[page], buffer)
            handle.poll(1000)
            for cookie in list(under_way):
                if handle.aio_command_completed(cookie):
                    page, version, _ = under_way.pop(cookie)
                    acknowledged[page] = version
                    done += 1
            if done >= killed_after and server.process is not None and server.process.returncode is None:
                server.kill()
    assert done >= killed_after


def test_a_killed_server_holds_nothing_and_loses_nothing(
    make_server: "Callable[..., Server]", segment: "_native.Segment"
) -> None:
    """Its pages stay; its weight and the memory promised to it are there for others, until it is back."""
    noise = random.Random(9)
    server = make_server("guest1")
    client = segment.client("guest1", create=False)
    data = noise.randbytes(256 * PAGE_SIZE)
    with server.client() as handle:
        handle.pwrite(data, 0)
    client.floor_bytes = 40 << 20
    # Ephemeral pages of the same client, cold, and of another one that is alive, colder.
    others = segment.client("others")
    others.hold()
    survivor, victim = (of.new_pool(persistent=False, exclusive=False) for of in (others, client))
    for pool in (survivor, victim):
        for index in range(1000):
            assert pool.put(bytes(OID_SIZE), index, noise.randbytes(PAGE_SIZE)) == 1
    assert client.held
    with pytest.raises(PoolError):
        segment.client("third").floor_bytes = 40 << 20
    server.kill()
    segment.reap()
    assert not client.held
    assert not client.statistics()["held"]
    # Others get what was promised to it; they take its ephemeral pages first.
    hog = others.new_pool(persistent=True)
    stored = 0
    while hog.put(bytes(OID_SIZE), stored, noise.randbytes(PAGE_SIZE), keep_old=True):
        stored += 1
        if victim.statistics()["pages"]:
            assert survivor.statistics()["pages"] == 1000
    assert stored * PAGE_SIZE > segment.memory_bytes - (10 << 20)
    assert victim.statistics()["pages"] == 0
    server.start()
    assert client.held
    with server.client() as handle:
        assert handle.pread(len(data), 0) == data
    segment.reap()
    assert segment.check() == []
