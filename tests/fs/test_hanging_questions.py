"""Links and extended attributes that a lower does not tell: who asks for them waits, and nobody else."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import READ
from .hanging import program as running
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends._native import Segment

pytestmark = pytest.mark.usefixtures("root")

STAT = "import os, sys; os.stat(sys.argv[1])"
MANY = 20
QUESTIONS = {
    "readlink": ("link", "assert os.readlink(sys.argv[1]) == 'slow'"),
    "getxattr": ("slow", "assert os.getxattr(sys.argv[1], 'user.one') == b'1'"),
    "listxattr": ("slow", "assert os.listxattr(sys.argv[1]) == ['user.one']"),
}


@pytest.fixture(params=["loop=native", BY_RINGS, "loop=fast", "loop=plain"])
def place(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "Segment", mounter: Mounter
) -> Iterator[Place]:
    (faulty.directory / "link").symlink_to("slow")
    (faulty.directory / "other link").symlink_to("other")
    for name in ("slow", "other"):
        os.setxattr(faulty.directory / name, "user.one", b"1")
    yield mounter(f"timeout=0,cache=direct,{request.param}", lower=faulty.point)
    faulty.heal()


@pytest.mark.parametrize("operation", QUESTIONS)
def test_a_question_that_hangs_holds_up_nobody_else(
    place: Place,
    faulty: Faulty,
    eventually: Callable[..., None],
    operation: str,
    request: pytest.FixtureRequest,
) -> None:
    """Nor do many."""
    native = "native" in request.node.callspec.params["place"]
    name, asks = QUESTIONS[operation]
    code = f"import os, sys; {asks}"
    many = f"import os, sys, threading\ndef ask(): {asks}\n"
    many += f"for _ in range({MANY}): threading.Thread(target=ask).start()"
    faulty.fail(operation, hangs=True, name=name)
    with running(many, place.point / name) as one, running(code, place.point / name) as killed:
        eventually(lambda: faulty.waiting() == [operation] * (MANY + 1))
        for others in (STAT, READ, "import os, sys; os.getxattr(sys.argv[1], 'user.one')"):
            with running(others, place.point / "other") as other:
                assert other.wait(60) == 0
        assert (place.point / "other link").readlink().name == "other"
        assert place.statistics().hit_reads >= 0
        assert one.poll() is None
        killed.kill()
        if native:  # else it ends when the lower answers
            assert killed.wait(60) == -signal.SIGKILL
        faulty.heal()
        assert one.wait(60) == 0
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0
