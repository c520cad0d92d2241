"""Changes that a lower does not answer: who makes them waits, and nobody else."""

import contextlib
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.errors import AttachError
from tmem.fs import mounts
from tmem.fs.mount import SUCCESSOR
from tmem.fs.plan import Successor

from .conftest import Mounter, Place
from .faulty import Faulty
from .hanging import CONTENT, READ
from .hanging import program as running
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends._native import Segment

pytestmark = pytest.mark.usefixtures("root")

CHANGE_THREADS = 40
STAT = "import os, sys; os.stat(sys.argv[1])"
WRITE = "import os, sys; f = os.open(sys.argv[1], os.O_RDWR); os.pwrite(f, b'new', 4096); os.close(f)"
REPLACE = "import os, sys; f = os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC); os.write(f, b'replaced')"


def goes_on(place: Place) -> None:
    """Others are looked up, asked for their attributes, opened and read."""
    for code in (STAT, READ):
        with running(code, place.point / "other") as other:
            assert other.wait(60) == 0


def test_an_open_to_write_that_hangs_holds_up_nobody_else(
    faulty_place: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """Nor does one that truncates; and what was read before is not what is read after."""
    slow = faulty_place.point / "slow"
    assert slow.read_bytes() == CONTENT
    faulty.fail("open", hangs=True, name="slow")
    with running(WRITE, slow) as one, running(WRITE, slow) as killed:
        eventually(lambda: faulty.waiting() == ["open"] * 2)
        goes_on(faulty_place)
        killed.kill()
        assert killed.wait(60) == -signal.SIGKILL
        assert one.poll() is None
        faulty.heal()
        assert one.wait(60) == 0
    assert slow.read_bytes() == CONTENT[:4096] + b"new" + CONTENT[4099:]
    faulty.fail("open", hangs=True, name="slow")
    with running(REPLACE, slow) as one:
        eventually(lambda: set(faulty.waiting()) == {"open"})  # that of the killed one may come late
        goes_on(faulty_place)
        faulty.heal()
        assert one.wait(60) == 0
    assert slow.read_bytes() == b"replaced"
    faulty_place.umount()
    assert os.waitpid(faulty_place.pid, 0)[1] == 0


@dataclass(frozen=True)
class Change:
    """One kind of change."""

    operation: str
    """What of the lower hangs."""
    code: str
    """What a program does in a directory `d`."""
    same: str
    """The same with what does not hang, in a directory `e`."""
    name: str = "slow"
    """Of what hangs."""


EXCHANGE = (
    "import ctypes; libc = ctypes.CDLL(None); "
    "assert not libc.renameat2(-100, ({0} + '{1}').encode(), -100, ({0} + 'link').encode(), 2)"
)
CHANGES = {
    "chmod": Change("setattr", "os.chmod(d + 'slow', 0o640)", "os.chmod(e + 'other', 0o640)"),
    "chown": Change("setattr", "os.chown(d + 'slow', 1, 2)", "os.chown(e + 'other', 1, 2)"),
    "utime": Change("setattr", "os.utime(d + 'slow', (10**9, 10**9))", "os.utime(e + 'other', (1, 10**9))"),
    "truncate": Change("setattr", "os.truncate(d + 'slow', 5000)", "os.truncate(e + 'other', 5000)"),
    "setxattr": Change(
        "setxattr", "os.setxattr(d + 'slow', 'user.a', b'1')", "os.setxattr(e + 'other', 'user.a', b'1')"
    ),
    "removexattr": Change(
        "removexattr", "os.removexattr(d + 'slow', 'user.old')", "os.removexattr(e + 'other', 'user.old')"
    ),
    "create": Change(
        "create",
        "os.close(os.open(d + 'new', os.O_CREAT | os.O_RDWR, 0o640))",
        "os.close(os.open(e + 'fresh', os.O_CREAT | os.O_RDWR, 0o640))",
        "new",
    ),
    "mkdir": Change("mkdir", "os.mkdir(d + 'new')", "os.mkdir(e + 'fresh')", "new"),
    "mknod": Change("mknod", "os.mkfifo(d + 'new')", "os.mkfifo(e + 'fresh')", "new"),
    "symlink": Change("symlink", "os.symlink('to', d + 'new')", "os.symlink('to', e + 'fresh')", "new"),
    "link": Change("link", "os.link(d + 'slow', d + 'new')", "os.link(e + 'other', e + 'fresh')", "new"),
    "unlink": Change("unlink", "os.unlink(d + 'slow')", "os.unlink(e + 'other')"),
    "rmdir": Change("rmdir", "os.rmdir(d + 'empty')", "os.rmdir(e + 'vacant')", "empty"),
    "rename": Change("rename", "os.rename(d + 'slow', d + 'new')", "os.rename(e + 'other', e + 'fresh')"),
    "replace": Change(
        "rename", "os.rename(d + 'second', d + 'slow')", "os.rename(e + 'third', e + 'other')", "second"
    ),
    "exchange": Change("rename", EXCHANGE.format("d", "slow"), EXCHANGE.format("e", "other")),
    "move": Change("rename", "os.rename(d + 'second', d + 'empty/new')", "os.mkdir(e + 'fresh')", "second"),
}


def does(code: str, point: Path) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    """A program that makes a change."""
    return running(f"import os, sys; d, e = sys.argv[1] + '/d/', sys.argv[1] + '/e/'; {code}", point)


LOOPS = ("loop=native", BY_RINGS, "loop=plain")


@pytest.fixture(params=["loop=native,timeout=1000", *(f"{loop},timeout=0" for loop in LOOPS)])
def tree(
    request: pytest.FixtureRequest, faulty: Faulty, segment: "Segment", mounter: Mounter
) -> Iterator[Place]:
    """A mount of two directories, ``d`` with a file ``slow`` and ``e`` with one called ``other``."""
    for name, file, more, empty in (("d", "slow", "second", "empty"), ("e", "other", "third", "vacant")):
        directory = faulty.directory / name
        directory.mkdir()
        (faulty.directory / file).rename(directory / file)
        os.setxattr(directory / file, "user.old", b"1")
        (directory / "link").symlink_to(file)
        (directory / more).write_bytes(b"more")
        (directory / empty).mkdir()
    made = mounter(request.param, lower=faulty.point)
    assert shown(made.point) == shown(faulty.directory)
    yield made
    faulty.heal()


def shown(directory: Path) -> dict[str, object]:
    """All that is to be seen of a tree, without what the lower of these tests makes up."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        seen: list[object] = [status.st_mode, status.st_uid, status.st_gid, status.st_nlink]
        if stat.S_ISLNK(status.st_mode):
            seen.append(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            data = path.read_bytes()
            assert len(data) == status.st_size
            seen += [data, {name: os.getxattr(path, name) for name in os.listxattr(path)}]
        found[str(path.relative_to(directory))] = seen
    return found


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_hangs_holds_up_nobody_else(
    tree: Place, faulty: Faulty, eventually: Callable[..., None], kind: str
) -> None:
    """Others go on with names, attributes, contents and changes of their own; then all is as it should be."""
    change = CHANGES[kind]
    faulty.fail(change.operation, hangs=True, name=change.name)
    meanwhile = "os.stat(d + 'slow'); os.listdir(d); open(d + 'slow').close(); os.lstat(d + 'link')"
    with does(change.code, tree.point) as one:
        eventually(lambda: faulty.waiting() == [change.operation])
        others = "os.lstat(e + 'link'); os.listdir(e); f = os.open(e + 'other', os.O_RDWR); os.read(f, 99); "
        others += "os.write(f, b'new')"
        for code in (others, change.same):
            with does(code, tree.point) as other:
                assert other.wait(60) == 0
        assert tree.statistics().put_pages
        with does(meanwhile, tree.point) as beside, does(change.code, tree.point) as another:
            assert one.poll() is None
            faulty.heal()
            assert one.wait(60) == 0
            assert beside.wait(60) in (0, 1)
            another.wait(60)
    assert shown(tree.point) == shown(faulty.directory)
    tree.umount()
    assert os.waitpid(tree.pid, 0)[1] == 0


@pytest.mark.parametrize("tree", ["loop=native,timeout=0", "loop=plain,timeout=0"], indirect=True)
def test_many_changes_that_hang_hold_up_only_others(
    tree: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """Names, attributes and contents are there, and statistics; with one more change the next ones wait.

    (By rings fewer come at a time: each CPU's 32.)
    """
    directories = [faulty.directory / f"many{number}" for number in range(CHANGE_THREADS + 1)]
    for directory in directories:
        directory.mkdir()
    code = f"""
import os, sys, threading
for number in range({len(directories)}):
    threading.Thread(target=os.mkdir, args=[f"{{sys.argv[1]}}/many{{number}}/new"]).start()
"""
    faulty.fail("mkdir", hangs=True, name="new")
    with (tree.point / "e" / "other").open("rb", buffering=0) as file, running(code, tree.point) as many:
        eventually(lambda: faulty.waiting() == ["mkdir"] * CHANGE_THREADS)
        hits = tree.statistics().hit_reads
        for start in range(0, len(CONTENT) - 4096, 4096):
            assert os.pread(file.fileno(), 4096, start) == CONTENT[start : start + 4096]
        assert tree.statistics().hit_reads > hits
        for others in (
            "os.lstat(e + 'link'); os.listdir(e); open(e + 'other', 'rb').read(9)",
            "os.listdir(d)",
        ):
            with does(others, tree.point) as other:
                assert other.wait(60) == 0
        with does("os.chmod(e + 'other', 0o640)", tree.point) as late:
            assert faulty.waiting() == ["mkdir"] * CHANGE_THREADS
            faulty.heal()
            assert many.wait(60) == 0
            assert late.wait(60) == 0
    assert shown(tree.point) == shown(faulty.directory)


def test_a_daemon_whose_changes_hang_can_be_ended(
    faulty: Faulty, segment: "Segment", mounter: Mounter, eventually: Callable[..., None]
) -> None:
    """It does not restart before they end."""
    for name in ("d", "e"):
        (faulty.directory / name).mkdir()
    made = mounter("loop=native", lower=faulty.point, successor=Successor(SUCCESSOR.code, 0.5))
    faulty.fail("mkdir", hangs=True, name="new")
    with does("os.mkdir(d + 'new')", made.point) as one:
        eventually(lambda: faulty.waiting() == ["mkdir"])
        with pytest.raises(AttachError, match="requests took longer"):
            made.restart()
        with does("os.mkdir(e + 'fresh')", made.point) as other:
            assert other.wait(60) == 0
        faulty.heal()
        assert one.wait(60) == 0
    assert made.restart().count == 1
    faulty.fail("mkdir", hangs=True, name="newer")
    with does("os.mkdir(d + 'newer')", made.point) as one:
        eventually(lambda: faulty.waiting() == ["mkdir"])
        os.kill(made.pid, signal.SIGTERM)
        eventually(lambda: mounts.top_mount(str(made.point)) is None)
        assert one.wait(60)
    faulty.kill()
    assert os.waitpid(made.pid, 0)[1] == 1 << 8


@pytest.mark.parametrize("tree", ["loop=native,timeout=0", "loop=plain,timeout=0"], indirect=True)
def test_a_read_at_the_end_whose_stat_hangs_holds_up_nobody_else(
    tree: Place, faulty: Faulty, eventually: Callable[..., None]
) -> None:
    """All pages are in the pool, but where the file ends only the lower knows."""
    last = len(CONTENT) - 4096
    with (tree.point / "d" / "slow").open("rb", buffering=0) as slow:
        assert os.pread(slow.fileno(), 8192, last) == CONTENT[last:]
        faulty.fail("getattr", hangs=True, name="slow")
        code = f"import os, sys; assert len(os.pread(int(sys.argv[1]), 8192, {last})) == 4096"
        with running(code, str(slow.fileno()), [slow.fileno()]) as one:
            eventually(lambda: "getattr" in faulty.waiting())
            with does("os.stat(e + 'other'); open(e + 'other', 'rb').read(9)", tree.point) as other:
                assert other.wait(60) == 0
            assert one.poll() is None
            faulty.heal()
            assert one.wait(60) == 0
    assert shown(tree.point) == shown(faulty.directory)
