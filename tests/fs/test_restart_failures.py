"""New code that cannot take over a mount does not get it: the old code goes on and says why."""

import fcntl
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.errors import AttachError
from tmem.fs import mounts, state
from tmem.fs.plan import Successor

from .conftest import Mounter, Place

if TYPE_CHECKING:
    from tmem.backends import _native

TAKE_OVER = "import sys; from tmem.fs.takeover import main; sys.exit(main(sys.argv[1:]))"


class NewCode:
    """A program that is the new code of a mount, and can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *lines: str) -> None:
        """Make it a shell script; ``$python`` is the interpreter."""
        partial = self.path.with_suffix(".new")
        partial.write_text("\n".join(["#!/bin/sh", f"python='{sys.executable}'", *lines]) + "\n")
        partial.chmod(0o755)
        partial.replace(self.path)

    def python(self, *lines: str) -> None:
        """Make it ours, with `lines` of Python run first."""
        script = "; ".join([*lines, TAKE_OVER])
        self.write(f'exec "$python" -P -c "{script}" "$@"')


@pytest.fixture
def code(tmp_path: Path) -> NewCode:
    return NewCode(tmp_path / "code")


@pytest.fixture
def place(mounter: Mounter, code: NewCode) -> Place:
    return mounter(successor=Successor((str(code.path),), drain_seconds=0.5))


def goes_on(place: Place, code: NewCode, message: str) -> None:
    """Show that a restart fails with `message`, that nothing has suffered, and that good code can follow."""
    (place.lower / "file").write_text("0123456789")
    inherited = place.inherited()  # from the test's process
    with (place.point / "file").open("r+") as file:
        assert file.read(3) == "012"
        with pytest.raises(AttachError, match=f"^{place.point} goes on as before: .*{message}") as raised:
            place.restart()
        assert "\n" not in str(raised.value)
        assert os.pread(file.fileno(), 10, 0) == b"0123456789"
        assert place.inherited() == inherited
        (place.point / "other").write_text("other")
        code.python()
        status = place.restart()
        assert (status.count, status.attempts, status.failure, status.pid) == (1, 2, "", place.pid)
        assert file.read() == "3456789"
    place.umount()
    assert os.waitpid(place.pid, 0)[1] == 0


def test_code_that_cannot_be_imported(place: Place, code: NewCode) -> None:
    code.write('exec "$python" -c "import nothing_of_this_name"')
    goes_on(place, code, "cannot take over: ModuleNotFoundError: No module named 'nothing_of_this_name'")


def test_code_that_is_not_there(place: Place, code: NewCode) -> None:
    goes_on(place, code, "cannot take over: .*: No such file or directory")


def test_code_that_dies(place: Place, code: NewCode) -> None:
    code.write("kill -9 $$")
    goes_on(place, code, "cannot take over: it ended with status -9")


def test_code_of_another_format(place: Place, code: NewCode) -> None:
    code.python("import tmem.fs.state as state", "state.FORMAT = 1000")
    here = f"the mount's state has format {state.FORMAT}"
    goes_on(place, code, f"{here}, the new code reads 1000: unmount and mount again")


def test_code_that_speaks_otherwise_to_the_kernel(place: Place, code: NewCode) -> None:
    code.python("import tmem.fs.overlay as overlay", "overlay.Overlay.enable_acl = False")
    goes_on(place, code, "its libfuse speaks otherwise to the kernel: unmount and mount again")


def test_code_that_asks_the_kernel_for_more_takes_over_what_older_code_has_mounted(
    place: Place, code: NewCode
) -> None:
    """Names of a directory side by side, which older code did not ask for, are not asked for then."""
    code.python(
        "import tmem.fs.state as state",
        "load = state.load",
        "less = lambda reply: reply[:30] + bytes([reply[30] & ~4]) + reply[31:]",
        "older = lambda device: {**device, 'reply': less(device['reply'])}",
        "state.load = lambda file: (lambda all: {**all, 'device': older(all['device'])})(load(file))",
    )
    assert place.restart().count == 1
    code.python()
    assert place.restart().count == 2  # it is what the kernel was told


def test_code_that_cannot_read_the_segment(
    place: Place, code: NewCode, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    eventually(lambda: place.statistics().pool_active)
    code.write(
        f'printf x | dd of="{segment.path}" conv=notrunc bs=1 count=1 status=none',
        f'"$python" -P -c "{TAKE_OVER}" "$@"',
        "status=$?",
        f'printf t | dd of="{segment.path}" conv=notrunc bs=1 count=1 status=none',
        "exit $status",
    )
    first = Path(segment.path).read_bytes()[:1]
    assert first == b"t"
    goes_on(place, code, "segment")


def test_exec_that_fails(place: Place, code: NewCode) -> None:
    code.write('[ "$1" = --check ] || exit 9', f'"$python" -P -c "{TAKE_OVER}" "$@" && rm "{code.path}"')
    goes_on(place, code, f"cannot run {code.path}: No such file or directory")


def test_requests_that_take_too_long(place: Place, code: NewCode) -> None:
    """Truncation of the lower file waits for a lease that is ours."""
    code.python()
    (place.lower / "file").write_text("0123456789")
    (place.lower / "other").write_text("other")
    with (place.lower / "file").open() as lease:
        fcntl.fcntl(lease, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        script = "import os, sys; os.truncate(sys.argv[1], 5)"
        command = [sys.executable, "-c", script, str(place.point / "file")]
        with subprocess.Popen(command) as truncating:
            try:
                with pytest.raises(subprocess.TimeoutExpired):
                    truncating.wait(1)
                with pytest.raises(AttachError, match=r"requests took longer than 0\.5 s: try again later"):
                    place.restart()
                assert (place.point / "other").read_text() == "other"
                fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                assert truncating.wait(60) == 0
            finally:
                truncating.kill()
    assert place.restart().count == 1
    assert (place.point / "file").read_text() == "01234"


def test_states_that_are_refused() -> None:
    content = {"plan": "plain"}
    good = struct.pack("<8sI4x", b"tmemfuse", state.FORMAT) + pickle.dumps(content)
    assert load(good) == content
    for wrong, message in (
        (b"", "no state of a mount"),
        (b"x" * 100, "no state of a mount"),
        (
            struct.pack("<8sI4x", b"tmemfuse", state.FORMAT + 1) + good[16:],
            f"has format {state.FORMAT + 1}, the new code reads {state.FORMAT}",
        ),
        (good[:-3], "cannot be read"),
        (good[:16] + pickle.dumps(Path("/")), "it refers to pathlib"),
    ):
        with pytest.raises(AttachError, match=message):
            load(wrong)


def load(content: bytes) -> object:
    descriptor = os.memfd_create("test")
    try:
        os.write(descriptor, content)
        return state.load(descriptor)
    finally:
        os.close(descriptor)


def test_a_mount_that_cannot_be_asked_says_why(mounter: Mounter, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=rf"cannot ask the daemon of {tmp_path}/no \(ENOENT: .*\): try"):
        mounts.restart_status(f"{tmp_path}/no")
    with pytest.raises(AttachError, match=r"cannot be restarted: unmount"):  # no attribute of this name
        mounts.restart_status(str(tmp_path))
    place = mounter()
    place.kill()
    with pytest.raises(AttachError, match=rf"the daemon of {place.point} has ended \(ENOTCONN\): .*mount"):
        place.restart()


def test_new_code_that_hangs_holds_up_no_end(
    mounter: Mounter, code: NewCode, eventually: Callable[..., None]
) -> None:
    """It is tried out for up to 30 s; the daemon, told to end, neither waits for it nor is given up."""
    place = mounter(successor=Successor((str(code.path),), drain_seconds=4.0))
    code.write('echo "$$" > "$0.pid"; exec sleep 1000')
    os.kill(place.pid, signal.SIGUSR1)
    number = Path(f"{code.path}.pid")
    eventually(lambda: number.exists() and number.read_text())
    os.kill(place.pid, signal.SIGTERM)
    assert os.waitpid(place.pid, 0)[1] == 0
    assert not Path(f"/proc/{int(number.read_text())}").exists()
