"""Many requests that hang at a time: a file takes no more of the daemon's threads than others can spare."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.tasks import of_threads

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import CONTENT, READ, program

if TYPE_CHECKING:
    from tmem.backends._native import Segment

MANY = 60
"""More than there are threads for all reads that the reader passes on, and its own."""


@pytest.fixture(params=["loop=native", "loop=fast"])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "Segment", mounter: Mounter
) -> Iterator[Place]:
    yield mounter(f"timeout=0,cache=direct,{request.param}", lower=faulty.point)
    faulty.heal()


def reading(pid: int) -> int:
    """Return how many threads of a process are in a pread."""
    calls = of_threads(pid, "syscall")
    return sum(call.startswith("17 ") for call in calls)


def test_a_file_that_many_read_while_it_hangs_holds_up_no_other(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """What others read is not in the pool, so threads have to wait for the lower; some of them in order."""
    code = f"""
import os, sys, threading
for file in [os.open(sys.argv[1], os.O_RDONLY) for _ in range({MANY})]:  # else they are taken for one stream
    threading.Thread(target=os.pread, args=[file, 100, 0]).start()
"""
    faulty.fail("read", hangs=True, name="slow")
    with program(code, place.point / "slow") as many:
        eventually(lambda: reading(many.pid) == MANY)
        whole = "import sys; f = open(sys.argv[1], 'rb', 0)\nwhile f.read(4096): pass"
        for reads in (READ, whole):
            with program(reads, place.point / "other") as other:
                assert other.wait(60) == 0
        assert set(faulty.waiting()) == {"read"}
        faulty.heal()
        assert many.wait(60) == 0
    assert (place.point / "slow").read_bytes() == CONTENT
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0
