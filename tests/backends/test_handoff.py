"""A client moves while it works: it loses nothing, and it lives in one place, whoever dies when."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import _native, handoff
from tmem.backends.savefile import Kind
from tmem.errors import HandoffError, PoolError
from tmem.types import PAGE_SIZE

from . import wanderer
from .handing import Handoff, Hook
from .pages import oid, page
from .places import Worker
from .test_save import Pages, get_all, persistent, put_all

PAGES = {(oid(1), index): page("text" if index % 2 else "random", index) for index in range(1200)}


@pytest.fixture
def source(directory: Path) -> Iterator[_native.Segment]:
    yield from _segment(directory / "source")


@pytest.fixture
def target(directory: Path) -> Iterator[_native.Segment]:
    yield from _segment(directory / "target")


def _segment(path: Path) -> Iterator[_native.Segment]:
    made = _native.create(str(path), 32 << 20)
    yield made
    assert made.check() == []
    made.close()


def nothing(kind: Kind) -> None:
    """Do nothing at any frame."""


def hand_over(
    source: _native.Segment, target: _native.Segment, before: Hook = nothing, after: Hook = nothing
) -> tuple[str, str]:
    """Hand ``one`` over; the errors of the sender and of the receiver."""
    return Handoff(Path(source.path), Path(target.path), before, after).end()


def is_here(segment: _native.Segment) -> bool:
    """Whether ``one`` is a client of the segment that works."""
    return [client.phase for client in segment.clients() if client.name == "one"] == ["none"]


def expect_empty(segment: _native.Segment) -> None:
    """Check that nothing is left of a client that was not to be."""
    segment.reap()
    assert segment.clients() == []
    segment.reap()
    assert segment.statistics()["persistent_pages"] == 0
    assert segment.statistics()["objects"] == 0
    assert segment.check() == []


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
    for seed in range(6 * effort):
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


# -- deaths

KINDS = (Kind.HEADER, Kind.CLIENT, Kind.DATA, Kind.SYNC, Kind.CLIENT_END, Kind.DEPARTING, Kind.COMMIT)


class Once:
    """A hook that does something at the first frame of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.done = False
        self.handoff: Handoff | None = None
        self.ready = threading.Event()

    def action(self, moving: Handoff) -> None:
        raise NotImplementedError

    def __call__(self, kind: Kind) -> None:
        if kind is self.kind and not self.done:
            self.done = True
            assert self.ready.wait(20)
            assert self.handoff is not None
            self.action(self.handoff)


class KillSender(Once):
    def action(self, moving: Handoff) -> None:
        moving.sender.kill()
        raise EOFError  # the frame does not arrive


class KillReceiver(Once):
    def action(self, moving: Handoff) -> None:
        moving.receiver.kill()


class StopReceiver(Once):
    def action(self, moving: Handoff) -> None:
        moving.receiver.stop()


def run(source: _native.Segment, target: _native.Segment, hook: Once, late: bool = False) -> Handoff:
    """Begin a handoff with a hook before a frame is passed on, or `late`, after."""
    hooks = (nothing, hook) if late else (hook, nothing)
    moving = Handoff(Path(source.path), Path(target.path), *hooks)
    hook.handoff = moving
    hook.ready.set()
    return moving


def works(segment: _native.Segment) -> None:
    """Check that ``one`` is in the segment, whole, and takes writes."""
    segment.reap()
    assert is_here(segment)
    pool = persistent(segment)
    assert get_all(pool, PAGES) == PAGES
    assert pool.put(oid(9), 9, page("text", 9)) == 1
    assert pool.flush(oid(9), 9) == 1
    assert segment.check() == []


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind is not Kind.COMMIT], ids=lambda kind: kind.name
)
def test_a_killed_sender_keeps_its_client(
    source: _native.Segment, target: _native.Segment, kind: Kind
) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    moving = run(source, target, KillSender(kind))
    _, said = moving.end()
    assert "the handoff ends early" in said
    expect_empty(target)
    works(source)


def test_a_sender_killed_when_it_has_departed(source: _native.Segment, target: _native.Segment) -> None:
    """COMMIT is written and did not arrive: nobody can know, so the client waits for an operator."""
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    _, said = run(source, target, KillSender(Kind.COMMIT)).end()
    assert "the handoff ends early" in said
    expect_empty(target)
    source.reap()
    assert source.client("one").phase == "departed"
    with pytest.raises(PoolError, match="handed over"):
        persistent(source).put(oid(1), 1, page("text", 1))
    source.client("one").handoff("end")
    works(source)


def test_a_sender_killed_when_its_commit_has_arrived(
    source: _native.Segment, target: _native.Segment
) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    _, said = run(source, target, KillSender(Kind.COMMIT), late=True).end()
    assert said == ""
    works(target)
    source.reap()
    for left in source.clients():  # none if the answer was quicker than the signal
        assert left.phase == "departed"
        left.destroy()
    expect_empty(source)


LAST = [(Kind.DEPARTING, True), (Kind.COMMIT, False), (Kind.COMMIT, True)]
"""Moments, and whether after them, at which the sender may have sent COMMIT."""


@pytest.mark.parametrize(
    ("kind", "late"),
    [(kind, late) for kind in KINDS for late in (False, True) if (kind, late) not in LAST],
    ids=lambda value: value.name if isinstance(value, Kind) else "after" if value else "before",
)
def test_a_killed_receiver_leaves_the_client_where_it_is(
    source: _native.Segment, target: _native.Segment, kind: Kind, late: bool
) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    said, _ = run(source, target, KillReceiver(kind), late).end()
    assert "'one' was not handed over and stays in segment 'source'" in said
    expect_empty(target)
    works(source)


@pytest.mark.parametrize(
    ("kind", "late"),
    LAST,
    ids=lambda value: value.name if isinstance(value, Kind) else "after" if value else "before",
)
def test_a_receiver_killed_at_the_commit(
    source: _native.Segment, target: _native.Segment, kind: Kind, late: bool
) -> None:
    """The client is there or not there, the sender cannot know, and says what to do."""
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    said, _ = run(source, target, KillReceiver(kind), late).end()
    if not said:
        assert late  # it was quick enough to answer
        works(target)
        expect_empty(source)
        return
    if "stays in segment 'source'" in said:
        assert kind is Kind.DEPARTING  # it was not quick enough to say READY
        expect_empty(target)
        works(source)
        return
    assert (
        "did not say whether it has 'one' (it has ended), so that waits: look there with 'tmem list'" in said
    )
    assert "'tmem --name source destroy one --force'" in said
    assert "'tmem --name source thaw one --force'" in said
    assert source.client("one").phase == "departed"
    target.reap()
    if is_here(target):
        assert late
        works(target)
        source.client("one").destroy()
        expect_empty(source)
    else:
        expect_empty(target)
        source.client("one").handoff("end")
        works(source)


@pytest.mark.parametrize("kind", [Kind.CLIENT_END, Kind.DEPARTING], ids=lambda kind: kind.name)
def test_a_receiver_that_hangs_is_given_up(
    source: _native.Segment, target: _native.Segment, kind: Kind
) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    moving = run(source, target, StopReceiver(kind))
    assert "stays in segment 'source': nothing came for 2 s" in moving.sender.end()
    works(source)
    moving.receiver.kill()
    moving.end()
    expect_empty(target)


def test_a_receiver_that_hangs_at_the_commit(source: _native.Segment, target: _native.Segment) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    moving = run(source, target, StopReceiver(Kind.COMMIT))
    assert "did not say whether it has 'one' (nothing came for 2 s)" in moving.sender.end()
    assert source.client("one").phase == "departed"
    moving.receiver.kill()
    moving.end()
    expect_empty(target)
    source.client("one").handoff("end")
    works(source)


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


def test_random_moments(source: _native.Segment, target: _native.Segment, effort: int) -> None:
    """Kills at the nth frame, whichever it is: the client is in one place, whole."""
    rng = random.Random(1)
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    here, there = source, target
    for _ in range(8 * effort):
        left = [rng.randrange(1, 14)]
        victim = rng.choice([KillSender, KillReceiver])

        class AtRandom(victim):  # type: ignore[misc, valid-type]
            def __call__(self, kind: Kind, left: list[int] = left) -> None:
                left[0] -= 1
                self.kind = kind
                if left[0] == 0:
                    super().__call__(kind)

        run(here, there, AtRandom(Kind.HEADER), late=rng.random() < 0.5).end()
        for segment in (here, there):
            segment.reap()
        if is_here(there):
            if here.clients():
                here.client("one").destroy()
            here, there = there, here
        elif here.client("one").phase == "departed":
            here.client("one").handoff("end")
        works(here)
        expect_empty(there)
