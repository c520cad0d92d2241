"""Faults while pages go to a tier and come back: nothing is lost, nothing hangs, no read fails."""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends.paths import SegmentPaths

from ..backends.tiers.servers import Cluster
from ..backends.tiers.servers import Server as RedisServer
from .board import Word, wait
from .rounds import FAULTS, Campaign, Fault, Stop, length, table
from .world import SWAP, World

LONGEST_S = 30.0
"""As in `test_rounds`; who reads waits as long for a tier, and then gets an error."""
LONG = os.environ.get("TMEM_LONG") == "1"
"""Every fault several times; else those that matter most, once."""
ROOMY = ("server killed", "several killed at once")
FULL = ("manager killed",)

Tiered = Callable[..., World]


@pytest.fixture
def tiered(paths: SegmentPaths, tmp_path: Path, seed: str, root: None) -> Iterator[Tiered]:
    """Make a world whose device has a tier: ``tiered("--tier", ...)``. Writes may be refused: without a
    manager, or with a tier that is full or down, there is no room for them."""
    made: list[World] = []

    def make(*tier: str) -> World:
        made.append(World(paths, tmp_path, seed, frozenset({errno.ENOSPC}), tier))
        made[0].open()
        return made[0]

    yield make
    for world in made:
        print(world.said())
        world.close()


def in_tier(world: World) -> int:
    return world.segment.client(SWAP, create=False).statistics()["tier_pages"]


def demoted(world: World) -> int:
    return sum(pool.statistics()["pages_demoted"] for pool in world.segment.client(SWAP).pools())


def campaign(world: World, seed: str, faults: dict[str, Fault]) -> None:
    world.work()
    world.swap.wait(lambda: in_tier(world) > 300, "pages are in the tier")
    world.rest()
    before = demoted(world)
    done = Campaign(world, seed, faults)
    for _ in range(len(faults) * (3 if LONG else 1)):
        done.next()
    print(table(done.rows))
    for name, row in done.rows.items():
        assert not row.rounds or max(row.swap_waits_s + row.files_waits_s) < LONGEST_S, name
    world.work()
    world.swap.wait(lambda: demoted(world) > before, "pages go to the tier, also after a fault")
    for child in world.loads:
        child.end()
    assert world.swap.board[Word.FAILED] == 0
    assert world.segment.client(SWAP).statistics()["unreachable_gets"] == 0


@pytest.mark.parametrize(("size", "chosen"), [("16M", ROOMY), ("1M", FULL)], ids=["roomy", "full"])
def test_a_spill_file(tiered: Tiered, tmp_path: Path, seed: str, size: str, chosen: tuple[str, ...]) -> None:
    world = tiered("--tier", f"file:{tmp_path}/spill?size={size}")
    if chosen == FULL:
        world.work()
        world.swap.wait(lambda: world.swap.board[Word.REFUSED] > 0, "the file is full")
        world.rest()
    campaign(world, seed, {name: FAULTS[name] for name in (FAULTS if LONG else chosen)})


def test_a_cluster(tiered: Tiered, redis_cluster: Cluster, seed: str) -> None:
    def replaced(victim: RedisServer) -> None:
        """Wait until its replica is primary, so that it does not come back empty as what it was."""
        others = {one.pid for one in redis_cluster.servers if one.process and one is not victim}
        wait(
            lambda: len({one.pid for one in redis_cluster.primaries()} & others) == 3, "a replica is elected"
        )

    def primary_killed(world: World, rng: random.Random) -> Stop:
        victim = rng.choice(redis_cluster.primaries())
        victim.kill()
        world.swap.proceed(100)  # before the election, and after it
        replaced(victim)
        world.swap.proceed(100)
        victim.start()
        wait(redis_cluster.settled, "the shard has a replica again")
        return Stop()

    def primary_stopped(world: World, rng: random.Random) -> Stop:
        victim = rng.choice(redis_cluster.primaries())
        with victim.stopped():
            time.sleep(length(rng))
        return Stop()

    def replica_killed(world: World, rng: random.Random) -> Stop:
        primaries = redis_cluster.primaries()
        victim = rng.choice([one for one in redis_cluster.servers if one not in primaries])
        victim.kill()
        world.swap.proceed(100)
        victim.start()
        wait(redis_cluster.settled, "the shard has a replica again")
        return Stop()

    world = tiered("--tier", redis_cluster.url)
    faults = {"primary killed": primary_killed, "manager killed": FAULTS["manager killed"]}
    if LONG:
        faults |= {"primary stopped": primary_stopped, "replica killed": replica_killed, **FAULTS}
    campaign(world, seed, faults)
