"""Closes that hang, as those of a FUSE lower whose FLUSH does: nobody else waits for them."""

import os
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

OPEN = "import os, sys; os.open(sys.argv[1], os.O_RDWR)"
"""Also looks at the file by a descriptor that only reads, and closes that."""


@pytest.fixture(params=["loop=native", BY_RINGS, "loop=fast", "loop=plain"])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "Segment", mounter: Mounter
) -> Iterator[Place]:
    yield mounter(f"timeout=0,cache=direct,{request.param}", lower=faulty.point)
    faulty.heal()


@pytest.mark.parametrize("code", [READ, OPEN], ids=["last close", "open for writing"])
def test_a_close_that_hangs_holds_up_nobody_else(
    place: Place, faulty: Faulty, eventually: Callable[..., None], code: str
) -> None:
    faulty.fail("flush", hangs=True, name="slow")
    with running(code, place.point / "slow") as one:
        eventually(lambda: faulty.waiting() == ["flush"])
        with running(READ, place.point / "other") as other:
            assert other.wait(60) == 0
        assert (place.point / "other").read_bytes() == CONTENT
        assert place.statistics().hit_reads >= 0
        with running(READ, place.point / "slow") as another:  # a program that does not wait for that close
            assert another.wait(60) == 0
        faulty.heal()
        assert one.wait(60) == 0
    eventually(lambda: faulty.waiting() == [])
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0
