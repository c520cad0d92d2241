"""Several connections, several clients, and names that a server does not have."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Server, nbd

if TYPE_CHECKING:
    from tmem.backends import _native


def test_all_connections_see_one_device(swap_server: Server) -> None:
    noise = random.Random(4)
    with ExitStack() as stack:
        clients = [stack.enter_context(swap_server.client()) for _ in range(4)]
        for turn in range(20):
            data = noise.randbytes(PAGE_SIZE)
            clients[turn % 4].pwrite(data, turn * PAGE_SIZE)
            assert clients[(turn + 1) % 4].pread(PAGE_SIZE, turn * PAGE_SIZE) == data


def test_connections_write_at_once(swap_server: Server) -> None:
    """Sub-page writes of four connections into the same pages: none is lost in another's
    read-modify-write."""
    part = PAGE_SIZE // 4
    npages = 32
    with ExitStack() as stack:
        clients = [stack.enter_context(swap_server.client()) for _ in range(4)]
        pending = []
        for page in range(npages):
            for number, client in enumerate(clients):
                buffer = nbd.Buffer.from_bytearray(bytearray([page + 1, number] * (part // 2)))
                cookie = client.aio_pwrite(buffer, page * PAGE_SIZE + number * part)
                pending.append((client, cookie, buffer))
        for client, cookie, _buffer in pending:
            while not client.aio_command_completed(cookie):
                client.poll(1000)
        expected = b"".join(
            bytes([page + 1, number] * (part // 2)) for page in range(npages) for number in range(4)
        )
        assert clients[0].pread(npages * PAGE_SIZE, 0) == expected


def test_another_export_name_is_refused(swap_server: Server) -> None:
    handle = nbd.NBD()
    handle.set_export_name("somebody-else")
    with pytest.raises(nbd.Error, match="No such file or directory"):
        handle.connect_unix(swap_server.export.unix)
    assert "there is no export 'somebody-else' here: this server has 'guest1'" in swap_server.log.read_text()


def test_the_export_of_another_client_is_refused(
    make_server: Callable[..., Server], segment: "_native.Segment"
) -> None:
    """A server has its own client's pages only, whoever asks (it lists no other name: see below)."""
    first, second = make_server("guest1"), make_server("guest2")
    with second.client() as client:
        client.pwrite(b"secret", 0)
    (pool,) = segment.client("guest2", create=False).pools()
    before = pool.statistics()
    for name in ("guest2", "guest1/../guest2", "guest2\t", "GUEST1", "guest1 "):
        handle = nbd.NBD()
        handle.set_export_name(name)
        with pytest.raises(nbd.Error, match="No such file or directory"):
            handle.connect_unix(first.export.unix)
    assert pool.statistics() == before
    assert "there is no export 'guest2' here: this server has 'guest1'" in first.log.read_text()


def test_the_export_is_listed_and_is_the_default(swap_server: Server) -> None:
    names: list[str] = []
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(swap_server.export.unix)

    def note(name: str, description: str) -> int:
        names.append(name)
        return 0

    handle.opt_list(note)
    handle.opt_go()  # with the empty name
    assert names == ["guest1"]
    assert handle.get_size() == swap_server.export.size_bytes
    handle.shutdown()


def test_clients_on_one_segment_do_not_see_each_other(make_server: Callable[..., Server]) -> None:
    first, second = make_server("guest1"), make_server("guest2")
    with first.client() as one, second.client() as two:
        one.pwrite(b"one", 0)
        two.pwrite(b"two", 0)
        assert one.pread(3, 0) == b"one"
        assert two.pread(3, 0) == b"two"
        one.trim(PAGE_SIZE, 0)
        assert two.pread(3, 0) == b"two"
