"""A lower that does not answer, and the native reader: hits go on, and who is killed ends at once."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import CONTENT, LIST, READ, program
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native


@pytest.fixture(params=["loop=native", BY_RINGS])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "_native.Segment", mounter: Mounter
) -> Iterator[Place]:
    made = mounter(f"timeout=0,cache=direct,{request.param}", lower=faulty.point)
    assert (made.point / "other").read_bytes() == CONTENT
    yield made
    with contextlib.suppress(OSError):
        faulty.heal()


@pytest.mark.parametrize("operation", ["lookup", "open", "getattr"])
def test_hits_go_on_while_all_of_python_waits(
    place: Place, faulty: Faulty, eventually: Callable[..., None], operation: str
) -> None:
    with (place.point / "other").open("rb", buffering=0) as other:
        assert os.pread(other.fileno(), PAGE_SIZE, 0) == CONTENT[:PAGE_SIZE]
        faulty.fail(operation, hangs=True, name="slow")
        with program(READ, place.point / "slow") as waiting:
            eventually(lambda: operation in faulty.waiting())
            for _ in range(20):  # what reaches the end asks the lower where that is
                for start in range(0, len(CONTENT) - PAGE_SIZE, PAGE_SIZE):
                    assert os.pread(other.fileno(), PAGE_SIZE, start) == CONTENT[start : start + PAGE_SIZE]
            assert waiting.poll() is None
            faulty.heal()
            assert waiting.wait(60) == 0
    assert (place.point / "slow").read_bytes() == CONTENT


KILLED = [
    ("read", READ, "slow", signal.SIGKILL),
    ("read", READ, "slow", signal.SIGTERM),
    ("lookup", READ, "slow", signal.SIGABRT),
    ("open", READ, "slow", signal.SIGKILL),
    ("getattr", READ, "slow", signal.SIGKILL),
    ("opendir", LIST, "", signal.SIGKILL),
    ("readdir", LIST, "", signal.SIGKILL),
]


@pytest.mark.parametrize(("operation", "code", "name", "number"), KILLED)
def test_who_is_killed_ends_at_once(
    place: Place,
    faulty: Faulty,
    eventually: Callable[..., None],
    operation: str,
    code: str,
    name: str,
    number: signal.Signals,
) -> None:
    faulty.fail(operation, hangs=True)
    with program(code, place.point / name) as waiting:
        eventually(lambda: operation in faulty.waiting())
        waiting.send_signal(number)
        assert waiting.wait(60) == -number
        assert operation in faulty.waiting()  # the lower has not answered
    faulty.heal()
    assert (place.point / "slow").read_bytes() == CONTENT
    assert set(os.listdir(place.point)) == {"slow", "other"}  # noqa: PTH208
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_what_cannot_be_looked_up_is_listed(place: Place, faulty: Faulty) -> None:
    """The kernel gives such an entry back at once; if that comes by a ring, it waits for an answer."""
    faulty.fail("lookup", errno=errno.EIO)
    for _ in range(2):
        with program(LIST, place.point) as listing:
            assert listing.wait(60) == 0
    faulty.heal()
    assert set(os.listdir(place.point)) == {"slow", "other"}  # noqa: PTH208


def test_who_is_killed_at_the_end_of_a_file_ends_at_once(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """All pages are in the pool, but where the file ends only the lower knows. It is closed meanwhile."""
    last = len(CONTENT) - PAGE_SIZE
    with (place.point / "other").open("rb", buffering=0) as other:
        assert os.pread(other.fileno(), 2 * PAGE_SIZE, last) == CONTENT[last:]
        faulty.fail("getattr", hangs=True, name="other")
        code = f"import os, sys; os.pread(int(sys.argv[1]), {2 * PAGE_SIZE}, {last})"
        number = other.fileno()
        with subprocess.Popen([sys.executable, "-c", code, str(number)], pass_fds=[number]) as waiting:
            other.close()
            eventually(lambda: "getattr" in faulty.waiting())
            waiting.kill()
            assert waiting.wait(60) == -signal.SIGKILL
            assert "getattr" in faulty.waiting()
    faulty.heal()
    assert (place.point / "other").read_bytes() == CONTENT
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_a_signal_that_is_handled_disturbs_nothing(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGALRM, lambda *_: None); "
        "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05); "
        "got = os.read(os.open(sys.argv[1], os.O_RDONLY), 4096); signal.setitimer(signal.ITIMER_REAL, 0); "
        "sys.exit(len(got) != 4096)"  # without the timer: at its end the interpreter handles no signal
    )
    faulty.fail("read", hangs=True, name="slow")
    with program(code, place.point / "slow") as waiting:
        eventually(lambda: faulty.waiting() == ["read"])
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        faulty.heal()
        assert waiting.wait(60) == 0
