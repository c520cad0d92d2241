"""Changes that a lower does not answer: who makes them waits, and nobody else."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import CONTENT, READ
from .hanging import program as running
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends._native import Segment

pytestmark = pytest.mark.usefixtures("root")

STAT = "import os, sys; os.stat(sys.argv[1])"
WRITE = "import os, sys; f = os.open(sys.argv[1], os.O_RDWR); os.pwrite(f, b'new', 4096); os.close(f)"
REPLACE = "import os, sys; f = os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC); os.write(f, b'replaced')"


@pytest.fixture(params=["loop=native", BY_RINGS])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "Segment", mounter: Mounter
) -> Iterator[Place]:
    yield mounter(f"timeout=0,cache=direct,{request.param}", lower=faulty.point)
    faulty.heal()


def goes_on(place: Place) -> None:
    """Others are looked up, asked for their attributes, opened and read."""
    for code in (STAT, READ):
        with running(code, place.point / "other") as other:
            assert other.wait(10) == 0


def test_an_open_to_write_that_hangs_holds_up_nobody_else(
    place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """Nor does one that truncates; and what was read before is not what is read after."""
    slow = place.point / "slow"
    assert slow.read_bytes() == CONTENT
    faulty.fail("open", hangs=True, name="slow")
    with running(WRITE, slow) as one, running(WRITE, slow) as killed:
        eventually(lambda: faulty.waiting() == ["open"] * 2)
        goes_on(place)
        killed.kill()
        assert killed.wait(10) == -signal.SIGKILL
        assert one.poll() is None
        faulty.heal()
        assert one.wait(10) == 0
    assert slow.read_bytes() == CONTENT[:4096] + b"new" + CONTENT[4099:]
    faulty.fail("open", hangs=True, name="slow")
    with running(REPLACE, slow) as one:
        eventually(lambda: set(faulty.waiting()) == {"open"})  # that of the killed one may come late
        goes_on(place)
        faulty.heal()
        assert one.wait(10) == 0
    assert slow.read_bytes() == b"replaced"
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0
