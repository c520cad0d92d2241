"""A mount that ends, or whose daemon fails, under running programs: they get an error, none waits long."""

import contextlib
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.fs import mounts
from tmem.fs.mount import SUCCESSOR
from tmem.fs.overlay import Overlay
from tmem.fs.plan import Successor
from tmem.fs.watch import Watch

from . import underneath
from .conftest import Mounter, Place
from .faulty import Faulty, ends
from .hanging import CONTENT, READ, busy, program, two_files
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

PATIENCE_S = 0.5


@pytest.fixture(params=["loop=native", BY_RINGS])
def place(request: pytest.FixtureRequest, segment: "_native.Segment", mounter: Mounter) -> Place:
    made = mounter(f"timeout=0,{request.param}")
    assert made.statistics().io_uring is (request.param == BY_RINGS)
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_daemon_ends_under_load(mounter: Mounter, place: Place, number: signal.Signals) -> None:
    """Programs get an error, none hangs, and the next mount is as if new."""
    (place.lower / "file").write_bytes(CONTENT)
    with busy(place.point / "file") as programs:
        os.kill(place.pid, number)
        assert os.waitpid(place.pid, 0)[1] == (number if number == signal.SIGKILL else 0)
        for one in programs:
            assert one.wait(60) == 1
    again = mounter("timeout=0")
    assert (again.point / "file").read_bytes() == CONTENT
    again.umount()


def test_unmounting_lazily_under_load(place: Place, eventually: Callable[..., None]) -> None:
    (place.lower / "file").write_bytes(CONTENT)
    with busy(place.point / "file") as programs:
        mounts.umount(str(place.point), lazily=True)
        for one in programs:  # its path is gone, or it reads on until it looks
            assert one.wait(60) == 1
    assert os.waitpid(place.pid, 0)[1] == 0


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    with two_files(tmp_path) as lower:
        yield lower


@pytest.fixture
def messages(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """What daemons that are forked from now on log."""
    path = tmp_path / "messages"
    handler = logging.FileHandler(path)
    logging.getLogger().addHandler(handler)
    yield path.read_text
    logging.getLogger().removeHandler(handler)
    handler.close()


STATFS = f"""
import errno, os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    sys.exit(error.errno not in ({errno.ENOTCONN}, {errno.ECONNABORTED}))
sys.exit(2)
"""
"""Says of the mount's daemon, which fails at that, that it is gone."""


def failing(*arguments: object) -> bool:
    raise LookupError("as of an error in the code")


async def broken(*arguments: object) -> object:
    return failing()


FAILURES = [(reader, hangs) for reader in ("loop=native", BY_RINGS) for hangs in ("", "read", "lookup")]
FAILURES += [("loop=fast", ""), ("loop=fast", "read")]  # with it the loop itself waits for names


@pytest.mark.parametrize(("reader", "hangs"), FAILURES)
def test_an_event_loop_that_fails(
    reader: str,
    hangs: str,
    faulty: Faulty,
    segment: "_native.Segment",
    mounter: Mounter,
    messages: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., None],
) -> None:
    """Also while threads wait for the lower."""
    monkeypatch.setattr(Overlay, "statfs", broken)
    options = f"timeout=0,cache=direct,{reader}"
    place = mounter(options, lower=faulty.point, successor=Successor(SUCCESSOR.code, PATIENCE_S))
    assert (place.point / "other").read_bytes() == CONTENT
    with contextlib.ExitStack() as stack:
        waiting = []
        if hangs:
            faulty.fail(hangs, hangs=True, name="slow")
            waiting.append(stack.enter_context(program(READ, place.point / "slow")))
            eventually(lambda: hangs in faulty.waiting())
        elif reader != "loop=fast":
            waiting += stack.enter_context(busy(place.point / "other", 1))
        waiting.append(stack.enter_context(program(STATFS, place.point)))
        assert ends(waiting[-1], 60)
        assert waiting[-1].returncode == 0
        eventually(lambda: mounts.top_mount(str(place.point)) is None)
        assert all(ends(one, 60) for one in waiting)
        faulty.kill()  # or the kernel keeps the process' threads that wait for it
        assert os.waitpid(place.pid, 0)[1] == 1 << 8
    assert messages().count("LookupError: as of an error in the code") == 1


def test_a_task_of_the_event_loop_that_fails(
    segment: "_native.Segment",
    mounter: Mounter,
    messages: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Here it is the one that takes reports of changes underneath."""
    monkeypatch.setattr(Watch, "_content", failing)
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "file").write_bytes(CONTENT)
    place = mounter("timeout=0")
    if not place.statistics().watching:
        pytest.skip("the kernel reports no changes of this file system")
    with busy(place.point / "file", 1) as (one,):
        underneath.write(place.lower / "file", 0, b"new")  # by us, who are not the daemon
        assert os.waitpid(place.pid, 0)[1] == 1 << 8
        assert ends(one, 60)
    assert mounts.top_mount(str(place.point)) is None
    assert messages().count("LookupError: as of an error in the code") == 1
