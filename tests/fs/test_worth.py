"""When a mount steps aside, with a clock and an account of the test's own, and on a real mount."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tmem.fs.worth import FIRST_REST_SECONDS, LEAST_PAGES, LONGEST_REST_SECONDS, LOOK_SECONDS, Account, Worth
from tmem.types import PAGE_SIZE

from .conftest import Mounter


class World:
    """A mount that does what it is told; its lower file takes 100 us a page, a put 5 us."""

    def __init__(self) -> None:
        self.now = 0.0
        self.account = Account(stored_pages=20_000)
        self.worth = Worth(lambda: self.account, lambda: self.now)
        self.worth.aside()

    def work(self, reused: int = 0, evicted: int = 20_000, ahead: int = 0, lower_ns: int = 100_000) -> None:
        old = self.account
        self.account = replace(
            old,
            hit_pages=old.hit_pages + reused + ahead,
            ahead_pages=old.ahead_pages + ahead,
            miss_reads=old.miss_reads + (evicted - ahead) // 256,
            lower_pages=old.lower_pages + evicted,
            lower_ns=old.lower_ns + evicted * lower_ns,
            put_ns=old.put_ns + evicted * 5000,
            gone_pages=old.gone_pages + evicted,
        )

    def later(self, seconds: float = LOOK_SECONDS) -> bool:
        self.now += seconds
        return self.worth.aside()


@pytest.fixture
def world() -> World:
    return World()


def test_scans_do_not_pay(world: World) -> None:
    world.work(reused=0)
    assert world.later()
    assert world.worth.resting


@pytest.mark.parametrize(("reused", "aside"), [(500, True), (1200, False)])
def test_hits_must_save_what_puts_cost(world: World, reused: int, aside: bool) -> None:
    world.work(reused=reused)  # each saves 98 us; putting 20,000 pages has cost 100 ms
    assert world.later() is aside


def test_hits_save_nothing_where_the_lower_is_as_fast(world: World) -> None:
    world.work(reused=100_000, lower_ns=2000)
    assert world.later()


def test_what_was_read_ahead_proves_nothing(world: World) -> None:
    world.work(ahead=20_000)
    assert world.later()


@pytest.mark.parametrize("evicted", [0, LEAST_PAGES - 1, 19_999])
def test_nothing_is_judged_before_the_pool_has_turned_over(world: World, evicted: int) -> None:
    world.work(evicted=evicted)
    assert not world.later()
    assert not world.later(3600)


def test_a_small_pool_is_not_judged_by_a_few_pages(world: World) -> None:
    world.account = replace(world.account, stored_pages=10)
    world.work(evicted=LEAST_PAGES - 1)
    assert not world.later()
    world.work(evicted=1)
    assert world.later()


def test_the_account_is_asked_for_once_a_second(world: World) -> None:
    world.work()
    assert not world.later(LOOK_SECONDS / 2)
    assert world.later(LOOK_SECONDS / 2)


def test_it_rests_longer_each_time_and_tries_again(world: World) -> None:
    rest = FIRST_REST_SECONDS
    for _ in range(10):
        world.work()
        assert world.later()
        assert world.later(rest - 1)
        assert not world.later(1)  # tries again
        assert not world.worth.resting
        rest = min(2 * rest, LONGEST_REST_SECONDS)
    assert rest == LONGEST_REST_SECONDS
    world.work(reused=20_000)
    assert not world.later()  # it pays
    world.work()
    assert world.later()
    assert not world.later(FIRST_REST_SECONDS)  # as at first


def test_each_window_is_judged_by_itself(world: World) -> None:
    world.work(reused=100_000)
    assert not world.later()
    world.work(reused=0)
    assert world.later()


def test_a_new_pool_begins_a_new_window(world: World) -> None:
    world.work(evicted=19_000)
    assert not world.later()
    world.account = replace(world.account, gone_pages=0)
    assert not world.later()
    world.work(evicted=19_000)
    assert not world.later()
    world.work(evicted=1000)
    assert world.later()


@pytest.mark.parametrize("option", ["step_aside=auto", "step_aside=never"])
def test_a_mount_steps_aside_of_scans(
    runtime_dir: Path, mounter: Mounter, eventually: Callable[..., None], option: str
) -> None:
    """On a pool of 8 MiB, files are read again and again that never fit, on a lower that costs nothing."""
    from tmem.backends import _native

    segment = _native.create(f"{runtime_dir}/default", 8 << 20)
    place = mounter(f"timeout=0,client=web,{option}")
    content = random.Random(1).randbytes(1 << 20)
    for number in range(20):
        (place.lower / f"{number}").write_bytes(content)

    def scan() -> bool:
        for number in range(20):
            assert (place.point / f"{number}").read_bytes() == content
        return place.statistics().stepped_aside

    with (place.point / "0").open("rb", buffering=0) as held:
        if option == "step_aside=never":
            while place.statistics().put_pages < 2 * LEAST_PAGES:
                assert not scan()
        else:
            eventually(scan, 30)

            opened = []

            def declined() -> bool:
                opened.append(place.statistics())
                assert (place.point / "7").read_bytes() == content
                return place.statistics().declined_opens == opened[-1].declined_opens + 1

            eventually(declined, 30)  # opens may have been granted below Python for another second
            before, after = opened[-1], place.statistics()
            assert (after.put_pages, after.hit_pages) == (before.put_pages, before.hit_pages)
            assert os.pread(held.fileno(), PAGE_SIZE, 0) == content[:PAGE_SIZE]
            assert place.statistics().passthrough_reads == after.passthrough_reads  # it was open before
    place.umount()
    assert segment.check() == []
    segment.close()
    _native.destroy(f"{runtime_dir}/default")
