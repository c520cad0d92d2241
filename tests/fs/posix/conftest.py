"""Mounts that many cases share, one for each way to run, beside plain directories; users who act in them."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.fs import mounts
from tmem.fs.mount import daemonise
from tmem.fs.options import MountOptions

from ..conftest import in_plenty
from ..images import file_system
from ..rings import BY_RINGS, permitted
from .compare import USERS, Actor, Twins, User
from .table import OPERATIONS

ELSEWHERE = "elsewhere,loop=native,cache=direct"
"""A mount that takes its lower for one that may not answer: threads change names and attributes."""
SHIPPED = "loop=native,cache=auto"
"""What a mount without options is where memory is in plenty: the kernel keeps small files."""
WHOLE = [SHIPPED, "loop=plain,cache=kernel"]
"""Of the table the others try what concerns contents only: all else is the same code as in these."""
if os.environ.get("TMEM_LONG") == "1":
    WHOLE += [f"{BY_RINGS},cache=direct", ELSEWHERE]
MODES = [*WHOLE, "loop=native,cache=direct", "loop=fast,cache=direct"]
NAMES = pytest.mark.parametrize("twins", WHOLE, indirect=True, scope="module")
"""For what concerns names and listings alone."""
PASSING = "loop=native,skip_files=*"
"""All files are passed through: their reads and writes are the kernel's, so only files are tried."""


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A directory that every user can enter, on an ext4 of its own where that is possible."""
    if os.geteuid() != 0:
        pytest.skip("needs root: acts as other users")
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(file_system("ext4"))
        except (OSError, subprocess.CalledProcessError):
            directory = Path(tempfile.mkdtemp(prefix="tmem-test-"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            directory.chmod(0o755)
        yield directory


@pytest.fixture(scope="module", params=MODES)
def twins(request: pytest.FixtureRequest, base: Path) -> Iterator[Twins]:
    """A mount with a pool, in each mode, and its twin."""
    with mounted(base, request.param) as place:
        yield place


@pytest.fixture(scope="module")
def passing(base: Path) -> Iterator[Twins]:
    """A mount that passes files through, and its twin."""
    with mounted(base, PASSING) as place:
        yield place
        assert mounts.statistics(str(place.point)).backed_opens


@contextlib.contextmanager
def mounted(base: Path, options: str) -> Iterator[Twins]:
    """Mount with a segment of its own, for all users."""
    directory = Path(tempfile.mkdtemp(prefix="mount-", dir=base))
    directory.chmod(0o755)
    roots = (directory / "plain", directory / "lower", directory / "point")
    place = Twins(*roots, options not in WHOLE, "loop=native" in options)
    for path in (place.plain, place.lower, place.point):
        path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        runtime = Path(tempfile.mkdtemp(prefix="tmem-test-", dir="/dev/shm"))
        patch.setenv("TMEM_RUNTIME_DIR", str(runtime))
        in_plenty(patch)
        (runtime / "default.d").mkdir(mode=0o700)
        segment = _native.create(str(runtime / "default"), 64 << 20)
        pid = -1
        try:
            if options == ELSEWHERE:
                patch.setattr("tmem.fs.base.is_local", lambda descriptor: False)
            options = options.removeprefix("elsewhere,")
            parsed = MountOptions.parse([f"client=web,allow_other,dev,suid,{options}"], str(place.point))
            with permitted(options):
                paths = SegmentPaths.of("default")
                pid = daemonise(str(place.lower), str(place.point), parsed, paths, locked=False)
            yield place
            assert segment.check() == []
        finally:
            with contextlib.suppress(AttachError):
                mounts.umount(str(place.point))
            if mounts.top_mount(str(place.point)) is not None:
                mounts.detach(str(place.point))
            if pid > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            segment.close()
            shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture(scope="session")
def actors() -> Iterator[dict[User, Actor]]:
    """A process for each user."""
    if os.geteuid() != 0:
        pytest.skip("needs root: acts as other users")
    started = {user: Actor(user, OPERATIONS) for user in USERS}
    yield started
    for actor in started.values():
        actor.close()
