"""nbdkit's own filters in front of the plugin: injected errors, delays and pauses, and kills in the midst."""

import errno
import itertools
import socket
import time
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths

from .board import Child, Word
from .serving import Serving, load, serving
from .world import check

_DEVICE_BYTES = 8 << 20
DELAY_MS = 3
A_MOMENT_S = 0.2
"""How long something that must not happen is given to happen."""


@pytest.mark.parametrize(
    ("word", "number", "counter"), [("EIO", errno.EIO, Word.FAILED), ("ENOSPC", errno.ENOSPC, Word.REFUSED)]
)
def test_injected_errors_reach_the_client_and_change_nothing(
    segment: _native.Segment,
    paths: SegmentPaths,
    tmp_path: Path,
    seed: str,
    word: str,
    number: int,
    counter: Word,
) -> None:
    """Reads, writes and trims fail at random; what failed was not done, what was answered was."""
    made = Serving(paths, segment, "guest1", _DEVICE_BYTES, ["error"], [f"error={word}", "error-rate=5%"])
    with serving(made), load(made, tmp_path / "error", seed, frozenset({number})) as swap:
        for times in (50, 100, 150):
            swap.wait(lambda wanted=times: swap.board[counter] >= wanted, "errors")  # type: ignore[misc]
            made.kill()
            made.start()
        swap.rest()
        check(segment)
        swap.work()
    check(segment)


def test_delays_only_delay(segment: _native.Segment, paths: SegmentPaths, tmp_path: Path, seed: str) -> None:
    made = Serving(
        paths,
        segment,
        "guest1",
        _DEVICE_BYTES,
        ["delay"],
        [f"delay-read={DELAY_MS}ms", f"delay-write={DELAY_MS}ms", f"delay-trim={DELAY_MS}ms"],
    )
    with serving(made), load(made, tmp_path / "error", seed, blocks=256) as swap:
        for _ in range(2):
            begin = time.monotonic()
            swap.proceed(50)
            assert time.monotonic() - begin >= 0.05 * DELAY_MS - 0.01
            made.kill()
            made.start()
        swap.proceed(10)
    check(segment)


def test_a_paused_server_loses_nothing(
    segment: _native.Segment, paths: SegmentPaths, tmp_path: Path, seed: str
) -> None:
    """Requests wait; later they are answered, by this server or, if it dies meanwhile, by the next."""
    control = paths.state / "pause.sock"
    made = Serving(paths, segment, "guest1", _DEVICE_BYTES, ["pause"], [f"pause-control={control}"])
    with serving(made), load(made, tmp_path / "error", seed) as swap:
        for _, dies in itertools.product(range(3), (False, True)):
            swap.proceed(100)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(control))
                tell(connection, b"p", b"P")
                assert stands_still(swap)
                if dies:
                    made.kill()
                    control.unlink()  # the filter binds to no name that exists
                    made.start()
                else:
                    tell(connection, b"r", b"R")
            swap.proceed(100)
        swap.rest()
        check(segment)
        assert swap.longest_s >= A_MOMENT_S
        swap.work()
    check(segment)


def tell(connection: socket.socket, command: bytes, answer: bytes) -> None:
    connection.sendall(command)
    assert connection.recv(1) == answer


def stands_still(swap: Child) -> bool:
    """Say whether there are no answers for a moment, once those under way to the client have arrived."""
    swap_idle = swap.board[Word.ANSWERED]
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        time.sleep(A_MOMENT_S)
        if swap.board[Word.ANSWERED] == swap_idle:
            return True
        swap_idle = swap.board[Word.ANSWERED]
    return False
