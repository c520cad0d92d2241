"""A killed server is started again by the manager: how long until the first reply on a new connection."""

import statistics
import time

import pytest

from tmem.nbd import export, server

from .blocks import nbd
from .board import Word
from .world import SWAP, World

KILLS = 5
LIMIT_S = 30.0
"""For a machine that does much else; on a quiet one it takes a fifth of a second."""


def measure(world: World, kills: int) -> list[float]:
    """Kill the server so often, each time under a new manager (which waits longer after each death)."""
    made = export.load(world.paths, SWAP)
    times = []
    for _ in range(kills):
        world.kill_server()
        begin = time.monotonic()
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_uri(made.uri)
                handle.pread(4096, 0)
            except nbd.Error:
                assert time.monotonic() - begin < LIMIT_S, "it does not serve again"
                time.sleep(0.001)
                continue
            break
        times.append(time.monotonic() - begin)
        handle.shutdown()
        world.end_manager()
        world.start_manager()
    return times


def test_a_killed_server_serves_again_soon(world: World) -> None:
    times = measure(world, KILLS)
    print(f"{len(times)} kills: median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
    assert max(times) < LIMIT_S
    world.work()
    world.rest()


def test_a_server_outlives_its_manager(world: World) -> None:
    """Whether that is told to end or is killed: its process and its connections stay."""
    before = world.server_process
    for end in (world.end_manager, world.kill_manager):
        world.work()
        end()
        with pytest.raises(AssertionError):  # also not a moment later
            world.swap.wait(lambda: not before.alive, "the server ends", timeout_s=0.3)
        world.start_manager()
        world.rest()
        assert server.running(world.paths, SWAP) == before
        assert world.swap.board[Word.CONNECTIONS] == 1
