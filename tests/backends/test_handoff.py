"""A client moves while it works: it loses nothing, and it lives in one place, whatever happens to it."""

import os
import threading
from pathlib import Path

import pytest

from tmem.backends import _native, handoff
from tmem.backends.savefile import Kind
from tmem.errors import HandoffError, PoolError
from tmem.types import PAGE_SIZE

from . import wanderer
from .handing import KINDS, PAGES, Handoff, Once, expect_empty, hand_over, is_here, run, works
from .pages import oid, page
from .places import Worker
from .saving import Pages, get_all, persistent, put_all, source, target

__all__ = ["source", "target"]


@pytest.mark.parametrize("number", [0, 1, 2, 1200])
def test_any_number_of_pages(source: _native.Segment, target: _native.Segment, number: int) -> None:
    pages = dict(list(PAGES.items())[:number])
    one = source.client("one")
    one.weight, one.floor_bytes = 7, 1 << 20
    put_all(one.new_pool(persistent=True, id=3), pages)
    one.new_pool(persistent=False, id=1)
    assert hand_over(source, target) == ("", "")
    expect_empty(source)
    assert is_here(target)
    there = target.client("one")
    assert (there.weight, there.floor_bytes) == (7, 1 << 20)
    assert [(pool.id, pool.persistent) for pool in there.pools()] == [(1, False), (3, True)]
    assert get_all(there.pool(3), pages) == pages
    assert there.pool(3).statistics()["pages"] == number


def test_there_and_back(source: _native.Segment, target: _native.Segment) -> None:
    """A second handoff is as complete as the first one: no marks of that are left."""
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    for _ in range(2):
        assert hand_over(source, target) == ("", "")
        source, target = target, source
    assert get_all(persistent(source), PAGES) == PAGES


def test_after_one_that_failed_everything_is_copied_again(
    source: _native.Segment, target: _native.Segment
) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    target.client("one")
    sender, receiver = hand_over(source, target)
    assert "stays in segment 'source': the receiver refused: segment 'target' has 'one' already" in sender
    assert "has 'one' already" in receiver
    assert "--" not in sender  # a handoff has none of the options of 'restore'
    assert is_here(source)
    target.client("one").destroy()
    assert hand_over(source, target) == ("", "")
    assert get_all(persistent(target), PAGES) == PAGES


# -- the client works


def test_what_happens_between_rounds(source: _native.Segment, target: _native.Segment) -> None:
    """Puts, duplicate puts and flushes during the copy (conformance test 12)."""
    pool = source.client("one").new_pool(persistent=True)
    put_all(pool, PAGES)
    wanted = dict(PAGES)

    def work(kind: Kind) -> None:
        if kind is Kind.SYNC:
            number = len(wanted)
            for at, index in enumerate(range(0, 1200, 100)):
                handle = oid(1), index
                if at % 3 == 0:
                    assert pool.flush(*handle) == (handle in wanted)
                    wanted.pop(handle, None)
                else:
                    wanted[handle] = page("random", number + at)
                    pool.put(*handle, wanted[handle])
            wanted[oid(2), number] = page("text", number)
            pool.put(oid(2), number, wanted[oid(2), number])

    assert hand_over(source, target, before=work) == ("", "")
    found = {**dict.fromkeys(PAGES, b""), **wanted}
    assert get_all(persistent(target), found) == wanted


def test_what_happens_while_it_is_frozen(source: _native.Segment, target: _native.Segment) -> None:
    """The last round is over, READY is not said: flushes and refused puts of direct users still count."""
    pool = source.client("one").new_pool(persistent=True)
    put_all(pool, PAGES)
    wanted = dict(PAGES)

    def work(kind: Kind) -> None:
        if kind is Kind.DEPARTING:
            assert source.client("one").phase == "frozen"
            for index in range(50):
                assert pool.flush(oid(1), index) == 1
                wanted.pop((oid(1), index))
            for index in range(50, 100):
                assert pool.put(oid(1), index, page("zero", 0)) == 0
                wanted.pop((oid(1), index))
            assert get_all(pool, PAGES) == wanted

    assert hand_over(source, target, before=work) == ("", "")
    assert get_all(persistent(target), PAGES) == wanted


def test_a_whole_object_flushed_while_it_is_copied(source: _native.Segment, target: _native.Segment) -> None:
    pool = source.client("one").new_pool(persistent=True)
    put_all(pool, PAGES)
    other: Pages = {(oid(number), index): page("text", 1) for number in (2, 3) for index in (0, 2**31)}
    put_all(pool, other)
    flushed: list[int] = []

    def work(kind: Kind) -> None:
        if kind is Kind.SYNC and not flushed:
            flushed.append(pool.flush_object(oid(1)))
            pool.put(oid(1), 7, page("text", 7))
        if kind is Kind.DEPARTING:
            flushed.append(pool.flush_object(oid(2)))

    assert hand_over(source, target, before=work) == ("", "")
    assert flushed == [1200, 2]
    wanted = {(oid(1), 7): page("text", 7), **{key: other[key] for key in other if key[0] == oid(3)}}
    assert get_all(persistent(target), {**PAGES, **other}) == wanted


def test_a_device_waits_and_ends(source: _native.Segment, target: _native.Segment) -> None:
    """Writes wait while it is frozen, everything once it has departed; then the device tells its server."""
    pool = source.client("one").new_pool(persistent=True)
    put_all(pool, {(bytes(24), 0): page("text", 0)})
    departed = threading.Event()
    device = _native.Device(pool, bytes(24), 16 * PAGE_SIZE, departed=departed.set)
    outcome: list[BaseException | None] = []

    def write() -> None:
        try:
            device.pwrite(None, page("random", 1), PAGE_SIZE, 0)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    writing = threading.Thread(target=write)

    def work(kind: Kind) -> None:
        if kind is Kind.DEPARTING:
            writing.start()
            buffer = bytearray(PAGE_SIZE)
            device.pread(None, buffer, 0, 0)
            assert bytes(buffer) == page("text", 0)
        if kind is Kind.COMMIT:
            assert not outcome
            assert not departed.is_set()

    assert hand_over(source, target, before=work) == ("", "")
    writing.join()
    assert departed.is_set()
    assert outcome != [None]  # never acknowledged, so whoever sent it sends it again
    assert get_all(persistent(target), {(bytes(24), 1): b""}) == {}


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_client_that_works_at_random_finds_everything(
    source: _native.Segment,
    target: _native.Segment,
    workers: list[Worker],
    directory: Path,
    effort: int,
    exclusive: bool,
) -> None:
    worker = workers[0]
    for seed in range(3 * effort):
        one = source.client("one")
        for number in (2, 11):
            one.new_pool(persistent=True, exclusive=exclusive, id=number)
        worker.attach(directory / "source")
        worker.start(wanderer.wander, directory / "target", seed, 3000)
        while one.pool(2).statistics()["puts"] < 500:
            pass
        assert hand_over(source, target) == ("", "")
        here, there, _ = worker.finish(wanderer.wander)
        assert (here > 500, there) == (True, 3000)
        target.client("one").destroy()
        expect_empty(source)
    assert target.check() == []


# -- what else can be in the way


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_client_is_destroyed_meanwhile(
    source: _native.Segment, target: _native.Segment, kind: Kind
) -> None:
    """Historic defect 10.9: the handoff ends with an error, and nothing leaks."""

    class Destroy(Once):
        def action(self, moving: Handoff) -> None:
            source.client("one", create=False).destroy()

    put_all(source.client("one").new_pool(persistent=True), PAGES)
    said, _ = run(source, target, Destroy(kind)).end()
    if kind is Kind.COMMIT:
        assert said == ""
        works(target)
    else:
        assert "'one' was not handed over and is no more" in said
        expect_empty(target)
    expect_empty(source)


def test_the_pools_are_changed_meanwhile(source: _native.Segment, target: _native.Segment) -> None:
    class Change(Once):
        def action(self, moving: Handoff) -> None:
            source.client("one").new_pool(persistent=True)

    put_all(source.client("one").new_pool(persistent=True, id=0), PAGES)
    said, _ = run(source, target, Change(Kind.SYNC)).end()
    assert "stays in segment 'source': its pools were changed meanwhile; try again" in said
    expect_empty(target)
    assert is_here(source)


def test_a_target_that_is_full(source: _native.Segment, directory: Path) -> None:
    """What fits in the beginning and does not in the end."""
    small = _native.create(str(directory / "target"), 8 << 20)
    pool = source.client("one").new_pool(persistent=True)
    put_all(pool, PAGES)

    class Fill(Once):
        def action(self, moving: Handoff) -> None:
            put_all(pool, {(oid(5), index): page("random", index) for index in range(2000)})

    said, told = run(source, small, Fill(Kind.SYNC)).end()
    assert "stays in segment 'source': the receiver refused: the handoff does not fit into segment" in said
    assert "it needs about" in told
    expect_empty(small)
    small.close()
    pool.flush_object(oid(5))
    works(source)


def test_a_name_taken_meanwhile(source: _native.Segment, target: _native.Segment) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)

    class Take(Once):
        def action(self, moving: Handoff) -> None:
            target.client("one").new_pool(persistent=True)

    said, _ = run(source, target, Take(Kind.COMMIT)).end()
    assert "stays in segment 'source': the receiver refused" in said
    works(source)
    assert [pool.statistics()["pages"] for pool in target.client("one").pools()] == [0]
    target.client("one").destroy()
    expect_empty(target)


def test_a_stream_that_is_damaged_on_the_way(source: _native.Segment, target: _native.Segment) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)

    class Damage(Once):
        def action(self, moving: Handoff) -> None:
            os.write(moving.relay._target, b"x")

    for kind in KINDS:
        said, _ = run(source, target, Damage(kind)).end()
        assert "stays in segment 'source': the receiver refused: the handoff is damaged" in said
        expect_empty(target)
        works(source)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["false"], "the answer of the receiver is empty"),
        (["echo", "Welcome to host"], r"the answer of the receiver was not written by tmem \(it begins with"),
        (["cat"], "the answer of the receiver is empty"),
    ],
    ids=["ends", "talks", "is closed"],
)
def test_a_command_that_is_no_receiver(source: _native.Segment, command: list[str], reason: str) -> None:
    source.client("one")
    argv = ["timeout", "1", *command]
    with pytest.raises(HandoffError, match=reason), handoff.receiver(argv) as (answers, stream):
        handoff.send(source, "source", "one", answers, stream)
    assert is_here(source)


def test_a_command_that_cannot_be_run() -> None:
    with (
        pytest.raises(HandoffError, match="none/such cannot be run: No such file"),
        handoff.receiver(["none/such"]),
    ):
        pytest.fail("not reached")


def test_a_client_that_is_not_there(source: _native.Segment) -> None:
    with pytest.raises(PoolError, match="segment 'source' has no client 'one'"):
        handoff.send(source, "source", "one", 0, 0)


def test_two_at_once(source: _native.Segment, target: _native.Segment, directory: Path) -> None:
    other = _native.create(str(directory / "other"), 32 << 20)
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    errors = []

    class Second(Once):
        def action(self, moving: Handoff) -> None:
            errors.append(hand_over(source, other)[0])

    assert run(source, target, Second(Kind.SYNC)).end() == ("", "")
    assert "'one' was not handed over and stays in segment 'source': somebody else is at it" in errors[0]
    works(target)
    expect_empty(other)
    other.close()
