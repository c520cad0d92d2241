"""A lower that does not answer: what need not wait for it does not, and the mount can be ended."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tmem.fs import mounts
from tmem.fs.mount import SUCCESSOR
from tmem.fs.plan import Successor
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .faulty import Faulty, ends
from .hanging import CONTENT, READ, program
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

PATIENCE_S = 0.5


@pytest.fixture(params=["loop=native", BY_RINGS, "loop=fast"])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "_native.Segment", mounter: Mounter
) -> Iterator[Place]:
    """A mount of it whose daemon, told to end, is patient for half a second."""
    options = f"timeout=0,cache=direct,{request.param}"
    made = mounter(options, lower=faulty.point, successor=Successor(SUCCESSOR.code, PATIENCE_S))
    assert (made.point / "other").read_bytes() == CONTENT
    yield made
    with contextlib.suppress(OSError):
        faulty.heal()


def test_hits_of_other_files_do_not_wait(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    with (place.point / "other").open("rb", buffering=0) as other:
        faulty.fail("read", hangs=True, name="slow")
        with program(READ, place.point / "slow") as one, program(READ, place.point / "slow") as two:
            eventually(lambda: faulty.waiting() == ["read", "read"])
            before = place.read_by_daemon()
            for start in range(0, len(CONTENT), PAGE_SIZE):
                assert os.pread(other.fileno(), PAGE_SIZE, start) == CONTENT[start : start + PAGE_SIZE]
            assert place.read_by_daemon() - before < len(CONTENT)
            assert (place.point / "other").read_bytes() == CONTENT  # nor do other opens
            command = [sys.executable, "-m", "tmem", "list"]
            assert subprocess.run(command, check=True, timeout=60, capture_output=True).stdout
            faulty.heal()
            assert ends(one, 60)
            assert ends(two, 60)
    assert (place.point / "slow").read_bytes() == CONTENT


@pytest.mark.parametrize("operation", ["read", "lookup", "getattr", "open"])
def test_a_daemon_that_waits_can_be_ended(
    place: Place, faulty: Faulty, eventually: Callable[..., None], operation: str
) -> None:
    """Also if all of it waits: programs get an error, the mount is gone, and the next one is as if new."""
    held = os.open(place.point / "other", os.O_RDONLY)
    faulty.fail(operation, hangs=True)
    with program(READ, place.point / "slow") as waiting:
        eventually(lambda: operation in faulty.waiting())
        begun = time.monotonic()
        os.kill(place.pid, signal.SIGTERM)
        eventually(lambda: mounts.top_mount(str(place.point)) is None)
        assert ends(waiting, 60)
        assert waiting.returncode
        assert time.monotonic() - begun < 10 * PATIENCE_S
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is checked
        os.pread(held, 1, 0)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with contextlib.suppress(OSError):
        os.close(held)
    faulty.kill()
    assert os.waitpid(place.pid, 0)[1] == 1 << 8


def test_a_daemon_whose_requests_end_in_time_ends_well(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    faulty.fail("read", hangs=True, name="slow")
    with program(READ, place.point / "slow") as waiting:
        eventually(lambda: faulty.waiting() == ["read"])
        os.kill(place.pid, signal.SIGTERM)
        eventually(lambda: mounts.top_mount(str(place.point)) is None)
        faulty.heal()
        assert ends(waiting, 60)
        assert waiting.returncode == 0  # it has got its bytes
    assert os.waitpid(place.pid, 0)[1] == 0


def test_a_program_that_is_killed_while_it_waits_ends(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """At the latest when the daemon is told to end: what is in its hands the kernel does not take back."""
    faulty.fail("read", hangs=True, name="slow")
    with program(READ, place.point / "slow") as waiting:
        eventually(lambda: faulty.waiting() == ["read"])
        waiting.kill()
        os.kill(place.pid, signal.SIGTERM)
        assert ends(waiting, 60)
        assert waiting.returncode == -signal.SIGKILL
