"""Who serves a client: `hold` says so for as long as the calling thread lives, however that ends."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.errors import PoolError

from . import operations as op
from .places import Local, Worker


@pytest.fixture
def worker(directory: Path, small: _native.Segment) -> Worker:
    made = Worker()
    made.attach(directory / "small")
    return made


@pytest.fixture(autouse=True)
def _ended(worker: Worker, small: _native.Segment) -> object:
    yield
    worker.close()
    small.reap()


def test_nobody_holds_a_new_client(client: _native.Client) -> None:
    assert not client.held
    assert client.statistics()["held"] == 0


def test_holding_twice_is_holding(client: _native.Client) -> None:
    for _ in range(3):
        client.hold()
        assert client.held
    assert client.statistics()["held"] == 1


@pytest.mark.parametrize("end", [lambda w: w.close(), lambda w: (w.process.kill(), w.process.wait())])
def test_until_the_process_ends(
    small: _native.Segment, client: _native.Client, worker: Worker, end: Callable[[Worker], object]
) -> None:
    worker.do(op.hold, "guest")
    assert client.held
    end(worker)
    small.reap()
    assert not client.held


def test_until_the_last_of_several_ends(
    directory: Path, small: _native.Segment, client: _native.Client, worker: Worker
) -> None:
    with Worker() as second:
        second.attach(directory / "small")
        for one in (worker, second):
            one.do(op.hold, "guest")
        worker.process.kill()
        worker.process.wait()
        assert small.reap() == 1
        assert client.held
    small.reap()
    assert not client.held


def test_until_the_thread_ends(
    small: _native.Segment, client: _native.Client, eventually: Callable[..., None]
) -> None:
    """Therefore a process holds from a thread that lives as long as it does. The kernel tells of its end."""
    held: list[bool] = []

    def serve() -> None:
        client.hold()
        held.append(client.held)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert held == [True]
    eventually(lambda: small.reap() or not client.held)
    assert not client.held


def test_until_the_segment_is_closed(directory: Path, small: _native.Segment, client: _native.Client) -> None:
    place = Local(directory / "small")
    place.do(op.hold, "guest")
    assert client.held
    place.close()
    small.reap()
    assert not client.held


def test_a_child_does_not_hold_what_its_parent_holds(small: _native.Segment, client: _native.Client) -> None:
    """A forked child that outlives its parent serves nobody; one that ends takes nothing away."""
    client.hold()
    child = os.fork()
    if child == 0:
        os._exit(0 if client.held else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    small.reap()
    assert client.held


def test_clients_are_held_one_by_one(small: _native.Segment, client: _native.Client, worker: Worker) -> None:
    others = [small.client(f"client {i}") for i in range(63)]
    for number in (0, 31, 62):
        worker.do(op.hold, others[number].name)
    held = {one.name for one in small.clients() if one.held}
    assert held == {others[number].name for number in (0, 31, 62)}
    others[31].destroy()
    again = small.client("client 31, another")
    assert again.id == others[31].id
    assert not again.held, "whoever held the number before does not hold the new client"
    worker.process.kill()
    worker.process.wait()
    small.reap()
    assert not any(one.held for one in small.clients())


def test_a_client_that_is_no_more(client: _native.Client) -> None:
    client.destroy()
    with pytest.raises(PoolError):
        client.hold()
    with pytest.raises(PoolError):
        _ = client.held
