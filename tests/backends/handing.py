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

_ROOT = Path(__file__).parents[2]

Hook = Callable[[Kind], None]


class Process:
    """A sender or receiver of its own."""

    def __init__(self, role: str, segment: Path, answers: int, stream: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, role, str(segment), str(answers), str(stream)],
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
    """A handoff of the client ``one``, under way; `sender` and `receiver` are processes."""

    def __init__(self, source: Path, target: Path, before: Hook, after: Hook) -> None:
        from_sender, sender_out = os.pipe()
        receiver_in, to_receiver = os.pipe()
        answers_in, answers_out = os.pipe()
        self.receiver = Process("receive", target, answers_out, receiver_in)
        self.sender = Process("send", source, answers_in, sender_out)
        for descriptor in (sender_out, receiver_in, answers_in, answers_out):
            os.close(descriptor)
        self.relay = Relay(from_sender, to_receiver, before, after)

    def end(self) -> tuple[str, str]:
        """Wait for everything; the errors of the sender and of the receiver."""
        errors = self.sender.end(), self.receiver.end()
        self.relay.join()
        return errors


def _main(role: str, path: str, answers: str, stream: str) -> None:
    try:
        if role == "send":
            # Short limits: a test of a receiver that hangs should not take as long as patience does.
            store = _native.attach(path)
            handoff.send(
                store, "source", "one", int(answers), int(stream), freeze_limit_s=2, commit_limit_s=2
            )
        else:
            handoff.receive(lambda: _native.attach(path), "target", int(stream), int(answers))
    except TmemError as error:
        print(error)


if __name__ == "__main__":
    _main(*sys.argv[1:])
