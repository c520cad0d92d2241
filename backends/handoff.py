"""Hands a client over to another segment, here or elsewhere, while it works: the sender and the receiver.

    sender                                     receiver
                                               answers with its header; stages the client
    HEADER CLIENT DATA... SYNC          ->     SYNCED, once everything before is stored
    DATA... SYNC (rounds)               ->     SYNCED
    freeze; DATA... CLIENT_END DEPARTING ->    READY: everything is there, unseen
    depart; DATA (flushes only) COMMIT  ->     commits; DONE
    destroys its client                        the client lives here

Until COMMIT is sent, the source goes back to normal when anything fails, and the receiver, which sees the
stream end, drops what it has staged. A COMMIT that is not answered leaves the source departed: its devices
wait, and an operator must look where the client is, since two of it would be worse than none. ERROR with a
reason may stand for any answer, also for DONE: then nothing was committed.

Flushes of direct users go on until "depart" has returned, so the last round follows it. It has nothing but
flushes, which need no memory: READY is a promise. Not for the rounds (`copying`) or filling (`restoring`).
Threading: one thread calls, and it must live until the function returns.
"""

import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from tmem.backends import interrupts
from tmem.backends.copying import ClientCopy, PoolsChangedError
from tmem.backends.restoring import Restorer
from tmem.backends.save import Saved, Watch, choose
from tmem.backends.savefile import MAX_FRAME_BYTES, FrameReader, Kind, new_buffer
from tmem.backends.saverecords import Header, summaries
from tmem.backends.streams import Descriptor, FrameInput, FrameOutput
from tmem.errors import HandoffError, PoolError, SaveFileError, TmemError

if TYPE_CHECKING:
    from tmem.backends import _native

FREEZE_LIMIT_S = 20.0
"""How long a frozen client waits for the receiver before it goes on where it is."""
COMMIT_LIMIT_S = 60.0
"""How long to wait for the answer to COMMIT."""
_SHRINKING = 0.8
_REASON_LIMIT_S = 5.0
_END_LIMIT_S = 2.0
_REMEDY = "hand over again"


class ToldError(HandoffError):
    """The receiver gave up, and both sides know why."""


def send(
    store: "_native.Segment",
    segment: str,
    name: str,
    answers: int,
    stream: int,
    watch: Watch = lambda done_bytes, all_bytes: None,
    freeze_limit_s: float = FREEZE_LIMIT_S,
    commit_limit_s: float = COMMIT_LIMIT_S,
) -> Saved:
    """Hand the client called `name` over to the receiver that reads the descriptor `stream` and answers on
    `answers`; return how it went. The client is then no more in this segment.

    A receiver that is silent for `freeze_limit_s` while the client is frozen is given up; `commit_limit_s` is
    how long to wait for the answer to COMMIT. Raises `PoolError` if there is no such client, else
    `HandoffError`, which says where the client is.
    """
    client = choose(store, segment, [name])[name]
    return _Sender(client, segment, name, answers, (freeze_limit_s, commit_limit_s)).run(stream, watch)


class _Sender:
    """One handoff, from the source's side."""

    def __init__(
        self, client: "_native.Client", segment: str, name: str, answers: int, limits: tuple[float, float]
    ) -> None:
        self._freeze_limit_s, self._commit_limit_s = limits
        self._client = client
        self._segment = segment
        self._name = name
        self._answers = Descriptor(answers)
        self._reader = FrameReader(
            self._answers.read, "the answer of the receiver", f"see what it said, and {_REMEDY}"
        )
        self._buffer = new_buffer(MAX_FRAME_BYTES)

    def run(self, stream: int, watch: Watch) -> Saved:
        here = f"tmem --name {self._segment}"
        try:
            # The receiver speaks first: nothing is copied for one that does not even start.
            self._expect(Kind.HEADER)
            out = FrameOutput(stream)
            try:
                return self._hand_over(out, watch)
            except BrokenPipeError:
                self._raise_reason()
                raise HandoffError("the receiver has ended: see what it said, then hand over again") from None
            finally:
                out.abandon()
        except _UnansweredError as error:
            raise HandoffError(
                f"the receiver did not say whether it has {self._name!r} ({error}), so that waits: look "
                f"there with 'tmem list'; if it is there, end it here with '{here} destroy {self._name} "
                f"--force', else let it go on here with '{here} thaw {self._name} --force'"
            ) from None
        except (TmemError, OSError) as error:
            where = f"stays in segment {self._segment!r}"
            try:
                self._client.pools()
            except PoolError:
                where = "is no more"
            raise HandoffError(f"{self._name!r} was not handed over and {where}: {error}") from error

    def _hand_over(self, out: FrameOutput, watch: Watch) -> Saved:
        clients = summaries([self._client])
        header = Header.here("handoff", self._segment, clients, secrets.token_hex(16))
        out.document(Kind.HEADER, 0, header.document())
        expected = sum(summary.data_bytes for summary in clients)
        copy = ClientCopy(self._client, 1, out, lambda: watch(out.data_bytes, expected))
        try:
            with copy:
                copy.copy(lambda: self._settle(out, Kind.SYNC, Kind.SYNCED), _SHRINKING)
                with interrupts.ignored():
                    self._leave(copy, out)
        except PoolsChangedError:
            raise HandoffError("its pools were changed meanwhile; try again") from None
        return Saved(self._name, copy.pages, copy.rounds, copy.frozen_s)

    def _leave(self, copy: ClientCopy, out: FrameOutput) -> None:
        """Do what must not be interrupted; every wait has an end."""
        self._answers.timeout_s = out.timeout_s = self._freeze_limit_s
        copy.freeze(out)
        copy.end()
        self._settle(out, Kind.DEPARTING, Kind.READY)
        self._client.handoff("depart")
        copy.round(out)
        out.drain()
        out.document(Kind.COMMIT, 1, {})
        copy.left = True
        self._answers.timeout_s = out.timeout_s = self._commit_limit_s
        try:
            # A pipe that breaks has not taken the frame, so nobody has committed.
            out.drain()
            self._expect(Kind.DONE)
        except (BrokenPipeError, ToldError):
            copy.left = False
            raise
        except SaveFileError:
            raise _UnansweredError("it has ended") from None
        except (TmemError, OSError) as error:
            raise _UnansweredError(str(error)) from None
        copy.settled()
        with suppress(PoolError):  # somebody was quicker
            self._client.destroy()

    # -- answers

    def _settle(self, out: FrameOutput, kind: Kind, answer: Kind) -> None:
        out.document(kind, 1, {})
        out.drain()
        self._expect(answer)

    def _expect(self, kind: Kind) -> None:
        frame = self._reader.next(self._buffer)
        if frame.kind is Kind.ERROR:
            reason = frame.document().get("reason")
            raise ToldError(f"the receiver refused: {reason}")
        if frame.kind is not kind:
            raise HandoffError(f"the receiver answered {frame.kind.name} instead of {kind.name}")

    def _raise_reason(self) -> None:
        """Read on for the reason of a receiver that does not read any more."""
        self._answers.timeout_s = _REASON_LIMIT_S
        with suppress(OSError):
            while True:
                try:
                    self._expect(Kind.ERROR)
                except ToldError:
                    raise
                except HandoffError:
                    continue  # an answer that was under way
                except TmemError:
                    return


class _UnansweredError(HandoffError):
    """COMMIT was sent, and nobody knows what came of it."""


def receive(attach: Callable[[], "_native.Segment"], segment: str, stream: int, answers: int) -> list[str]:
    """Take a client from the sender that writes to the descriptor `stream`; the names of what came.

    `attach` opens the segment called `segment`: if it fails, the sender shall know. Raises `ToldError` if the
    sender was told why nothing came, else another `TmemError`.
    """
    out = FrameOutput(answers)
    try:
        out.document(Kind.HEADER, 0, Header.here("receive", segment, (), secrets.token_hex(16)).document())
        with closing(attach()) as store:
            return _receive(store, segment, stream, out)
    except (TmemError, OSError) as error:
        try:
            out.document(Kind.ERROR, 0, {"reason": str(error)})
            out.close()
        except OSError:
            raise error from None
        raise ToldError(str(error)) from error
    finally:
        out.abandon()


def _receive(store: "_native.Segment", segment: str, stream: int, out: FrameOutput) -> list[str]:
    with (
        closing(FrameInput(stream, "the handoff", Kind.COMMIT, remedy=_REMEDY)) as frames,
        Restorer(store, segment, "the handoff") as restorer,
    ):
        restorer.begin(frames, "handoff")
        for frame in frames:
            if frame.kind is Kind.SYNC:
                out.document(Kind.SYNCED, 1, {})
            elif frame.kind is Kind.DEPARTING:
                restorer.check_complete()
                out.document(Kind.READY, 1, {})
            elif frame.kind is Kind.COMMIT:
                break
            else:
                restorer.apply(frame)
        with interrupts.ignored():
            restorer.commit()
            with suppress(OSError):  # the sender is gone; what it has sent is here all the same
                out.document(Kind.DONE, 1, {})
                out.close()
        return restorer.committed


@contextmanager
def receiver(argv: Sequence[str], own_group: bool = False) -> Iterator[tuple[int, int]]:
    """Run `argv`, a receiver, and yield the descriptors for its answers and for its stream.

    With `own_group` a Ctrl-C at the terminal does not reach it; a command that asks at the terminal, as ssh
    does, needs to stay in ours. Raises `HandoffError` if it cannot be run. It does not outlive the block.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0 if own_group else None,
        )
    except OSError as error:
        raise HandoffError(f"{argv[0]} cannot be run: {error.strerror or error}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdout, process.stdin:
            yield process.stdout.fileno(), process.stdin.fileno()
    finally:
        # Without a sender it ends by itself, and says why.
        for number in (0, signal.SIGTERM, signal.SIGKILL):
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_LIMIT_S)
                break
