"""Both sides of a handoff as processes, and a relay between them that can be told when to do something.

    sender  --stream-->  Relay  --stream-->  receiver        answers go the other way, directly

This is also their program: ``python -m tests.backends.handing send|receive SEGMENT ANSWERS STREAM``.
A process prints the error that it ends with on standard output, as one line.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tmem.backends import _native, handoff
from tmem.backends.savefile import HEAD_BYTES, PREAMBLE_BYTES, Kind, aligned
from tmem.errors import TmemError

from .pages import oid, page
from .saving import get_all, persistent

_ROOT = Path(__file__).parents[2]

Hook = Callable[[Kind], None]

PATIENT_S = 30.0
"""For a receiver that has nothing against it but a busy machine."""
HASTY_S = 2.0
"""For one that hangs: the test should not take as long as patience does."""


class Process:
    """A sender or receiver of its own."""

    def __init__(self, role: str, segment: Path, answers: int, stream: int, limit_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, role, str(segment), str(answers), str(stream), str(limit_s)],
            cwd=_ROOT,
            pass_fds=[answers, stream],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGSTOP it."""
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self) -> str:
        """Wait until it has ended; the error, empty if there was none."""
        out, _ = self._process.communicate(timeout=60)
        return out.strip()


class Relay:
    """Passes the stream on frame by frame, and calls `before` and `after` with the kind of each one."""

    def __init__(self, source: int, target: int, before: Hook, after: Hook) -> None:
        self._source, self._target = source, target
        self._before, self._after = before, after
        self.error: BaseException | None = None
        self.kinds: list[Kind] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            # Whoever is killed breaks a pipe, and the relay with it.
            with suppress(EOFError, BrokenPipeError):
                self._write(self._read(PREAMBLE_BYTES))
                while True:
                    head = self._read(HEAD_BYTES)
                    length, number = struct.unpack_from("<IB", head)
                    payload = self._read(aligned(HEAD_BYTES + length) - HEAD_BYTES)
                    kind = Kind(number)
                    self._before(kind)
                    self._write(head + payload)
                    self.kinds.append(kind)
                    self._after(kind)
        except BaseException as error:
            self.error = error
        finally:
            os.close(self._source)
            os.close(self._target)

    def _read(self, length: int) -> bytes:
        got = b""
        while len(got) < length:
            more = os.read(self._source, length - len(got))
            if not more:
                raise EOFError
            got += more
        return got

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._target, data) :]


class Handoff:
    """A handoff of the client ``one``, under way; `sender` and `receiver` are processes.

    The sender takes a receiver that is silent for `limit_s` for one that hangs.
    """

    def __init__(
        self, source: Path, target: Path, before: Hook, after: Hook, limit_s: float = PATIENT_S
    ) -> None:
        from_sender, sender_out = os.pipe()
        receiver_in, to_receiver = os.pipe()
        answers_in, answers_out = os.pipe()
        self.receiver = Process("receive", target, answers_out, receiver_in, limit_s)
        self.sender = Process("send", source, answers_in, sender_out, limit_s)
        for descriptor in (sender_out, receiver_in, answers_in, answers_out):
            os.close(descriptor)
        self.relay = Relay(from_sender, to_receiver, before, after)

    def end(self) -> tuple[str, str]:
        """Wait for everything; the errors of the sender and of the receiver."""
        errors = self.sender.end(), self.receiver.end()
        self.relay.join()
        return errors


PAGES = {(oid(1), index): page("text" if index % 2 else "random", index) for index in range(1200)}
"""What the client has in most tests."""

KINDS = (Kind.HEADER, Kind.CLIENT, Kind.DATA, Kind.SYNC, Kind.CLIENT_END, Kind.DEPARTING, Kind.COMMIT)
"""Of frames, in the order in which they come first."""


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
            assert self.ready.wait(60)
            assert self.handoff is not None
            self.action(self.handoff)


def run(
    source: _native.Segment,
    target: _native.Segment,
    hook: Once,
    late: bool = False,
    limit_s: float = PATIENT_S,
) -> Handoff:
    """Begin a handoff with a hook before a frame is passed on, or `late`, after."""
    before, after = (nothing, hook) if late else (hook, nothing)
    moving = Handoff(Path(source.path), Path(target.path), before, after, limit_s)
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


def _main(role: str, path: str, answers: str, stream: str, limit: str) -> None:
    try:
        if role == "send":
            store, limit_s = _native.attach(path), float(limit)
            handoff.send(
                store,
                "source",
                "one",
                int(answers),
                int(stream),
                freeze_limit_s=limit_s,
                commit_limit_s=limit_s,
            )
        else:
            handoff.receive(lambda: _native.attach(path), "target", int(stream), int(answers))
    except TmemError as error:
        print(error)


if __name__ == "__main__":
    _main(*sys.argv[1:])
