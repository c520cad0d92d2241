"""A daemon that gets no more threads (a limit of its control group): all is answered, and it ends."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.groups import removed
from tests.waiting import wait_until
from tmem.fs import mounts

from .conftest import Mounter
from .faulty import Faulty, ends
from .hanging import CONTENT, program

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

WORK = f"""
import os, sys
root = sys.argv[1]
new = root + "/new"
for _ in range(2):
    assert sorted(os.listdir(root)) == ["other", "slow"]
    for name in ("slow", "other"):
        assert os.stat(root + "/" + name).st_size == {len(CONTENT)}
        with open(root + "/" + name, "rb") as file:
            assert len(file.read()) == {len(CONTENT)}
    with open(new, "w+b") as file:
        file.write(b"x" * 9000)
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 9001, 0) == b"x" * 9000
    os.statvfs(root)
    os.unlink(new)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that can limit how many threads there are."""
    mounted = Path("/sys/fs/cgroup")
    if (mounted / "pids").is_dir():  # version 1
        mounted /= "pids"
    made = mounted / f"tmem-test-{os.getpid()}"
    made.mkdir()
    try:
        if not (made / "pids.max").exists():
            pytest.skip("no pids cgroup controller")
        yield made
        for pid in (made / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (mounted / "cgroup.procs").write_text(pid)
    finally:
        wait_until(lambda: removed(made), what=f"{made} is empty")


def test_all_is_answered(faulty: Faulty, segment: "_native.Segment", mounter: Mounter, group: Path) -> None:
    """Of a lower that is elsewhere: threads are wanted for everything."""
    place = mounter("timeout=0,cache=direct", lower=faulty.point)
    (group / "cgroup.procs").write_text(str(place.pid))
    (group / "pids.max").write_text((group / "pids.current").read_text())
    with program(WORK, place.point) as one:
        assert ends(one, 30)
        assert one.returncode == 0
    assert int((group / "pids.events").read_text().split()[1]) > 0  # threads were refused
    os.kill(place.pid, signal.SIGTERM)
    assert os.waitpid(place.pid, 0)[1] == 0
    assert mounts.top_mount(str(place.point)) is None
