"""Whoever dies or hangs when: a client that is handed over is in one place, whole, or an operator is told."""

import os
import random
import signal
import threading

import pytest

from tmem.backends import _native
from tmem.backends.savefile import Kind
from tmem.errors import PoolError
from tmem.types import OID_SIZE

from .handing import HASTY_S, KINDS, PAGES, Handoff, Once, expect_empty, is_here, run, works
from .pages import oid, page
from .saving import persistent, put_all, source, target

__all__ = ["source", "target"]


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


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_no_device_waits_for_who_is_stopped_or_dead(source: _native.Segment, number: signal.Signals) -> None:
    """Ctrl-Z, or the OOM killer, in the milliseconds in which the client is frozen; there is no manager."""
    pool = source.client("one").new_pool(persistent=True)
    device = _native.Device(pool, bytes(OID_SIZE), 1 << 20)
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client = _native.attach(source.path).client("one")
            client.handoff("copy")
            client.handoff("freeze")
            os.read(told, 1)
            os.kill(os.getpid(), number)
            client.handoff("end")
        finally:
            os._exit(0)
    there, goes = threading.Event(), threading.Event()

    def write() -> None:
        device.pread(None, bytearray(1), 0, 0)  # a new thread would look for the dead's place, and repair it
        there.set()
        goes.wait()
        device.pwrite(None, page("text", 1), 0, 0)

    writes = threading.Thread(target=write, daemon=True)
    writes.start()
    assert there.wait(40)
    os.write(tells, b"x")
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert (os.WSTOPSIG if os.WIFSTOPPED(status) else os.WTERMSIG)(status) == number
    goes.set()
    writes.join(20)
    waits = writes.is_alive()
    if waits:  # else the segment cannot be closed
        source.reap()
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
        assert os.waitpid(pid, 0)[1] == 0
    writes.join()
    for descriptor in (told, tells):
        os.close(descriptor)
    assert not waits
    assert source.client("one").phase == "none"


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
    moving = run(source, target, StopReceiver(kind), limit_s=HASTY_S)
    assert "stays in segment 'source': nothing came for 2 s" in moving.sender.end()
    works(source)
    moving.receiver.kill()
    moving.end()
    expect_empty(target)


def test_a_receiver_that_hangs_at_the_commit(source: _native.Segment, target: _native.Segment) -> None:
    put_all(source.client("one").new_pool(persistent=True), PAGES)
    moving = run(source, target, StopReceiver(Kind.COMMIT), limit_s=HASTY_S)
    assert "did not say whether it has 'one' (nothing came for 2 s)" in moving.sender.end()
    assert source.client("one").phase == "departed"
    moving.receiver.kill()
    moving.end()
    expect_empty(target)
    source.client("one").handoff("end")
    works(source)


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
