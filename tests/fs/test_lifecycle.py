"""The life of a mount: it answers when the command is back, ends cleanly, and survives a killed daemon."""

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError
from tmem.fs import mounts
from tmem.fs.mount import daemonise
from tmem.fs.options import MountOptions

from .conftest import Mounter, Place


def mount_kinds(point: Path | str) -> list[str]:
    return [mount.kind for mount in mounts.mounts() if mount.mountpoint == str(point)]


def test_the_lower_directory_is_the_source(place: Place) -> None:
    top = mounts.top_mount(str(place.point))
    assert top is not None
    assert (top.kind, top.source) == ("fuse.tmem", str(place.lower))


def test_unmounting_waits_for_the_daemon(place: Place) -> None:
    place.umount()
    assert mount_kinds(place.point) == []
    assert os.waitpid(place.pid, os.WNOHANG)[0] == place.pid
    with pytest.raises(AttachError, match="no mount of tmem"):
        place.umount()


def test_unmounting_while_files_are_open_says_what_to_do(place: Place) -> None:
    (place.lower / "file").write_text("x")
    with (place.point / "file").open() as file:
        with pytest.raises(AttachError, match=r"is in use: close the files open on it \('fuser -vm"):
            place.umount()
        assert file.read() == "x"
    place.umount()


def test_lazy_unmounting_leaves_open_files_readable(place: Place) -> None:
    (place.lower / "file").write_text("still readable")
    with (place.point / "file").open() as file:
        mounts.umount(str(place.point), lazily=True)
        assert list(place.point.iterdir()) == []
        assert file.read() == "still readable"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_mount_even_with_open_files(place: Place, number: int) -> None:
    (place.lower / "file").write_text("x")
    descriptor = os.open(place.point / "file", os.O_RDONLY)
    try:
        os.kill(place.pid, number)
        assert os.waitpid(place.pid, 0)[1] == 0
        assert mount_kinds(place.point) == []
        with pytest.raises(OSError, match="not connected"):
            os.read(descriptor, 1)
    finally:
        with contextlib.suppress(OSError):  # closing asks the daemon that is gone
            os.close(descriptor)


def test_a_killed_daemon_leaves_a_mount_that_the_next_one_sweeps(mounter: Mounter) -> None:
    place = mounter()
    (place.point / "file").write_text("before")
    place.kill()
    with pytest.raises(OSError, match="not connected"):
        (place.point / "file").read_text()
    again = mounter()
    assert (again.point / "file").read_text() == "before"
    assert mount_kinds(place.point) == ["fuse.tmem"]


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED])
def test_a_mount_is_dead_by_any_error_that_says_so(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def stat(path: str) -> os.stat_result:
        raise OSError(code, os.strerror(code), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat)
        assert mounts.is_dead("/somewhere")


def test_a_dead_mount_can_be_unmounted(place: Place) -> None:
    place.kill()
    place.umount()
    assert mount_kinds(place.point) == []


def test_a_second_mount_at_the_same_place_is_refused(mounter: Mounter) -> None:
    place = mounter()
    with pytest.raises(AttachError, match="carries a tmem mount already"):
        mounter()
    (place.lower / "file").write_text("x")
    assert (place.point / "file").read_text() == "x"
    assert mount_kinds(place.point) == ["fuse.tmem"]


def test_a_directory_can_be_mounted_over_itself(mounter: Mounter, tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "file").write_text("x")
    place = mounter(lower=lower, point=lower)
    assert (lower / "file").read_text() == "x"
    assert place.statistics().passthrough_reads >= 1
    place.umount()


@pytest.mark.parametrize(
    ("lower", "point", "message"),
    [
        ("none", "mount", "cannot use .*none: No such file"),
        ("file", "mount", "is not a directory: name the directory"),
        ("lower", "none", "No such file or directory; make the directory first"),
        ("lower", "file", "is not a directory: make one"),
        ("lower", "lower/inside", "is inside .*: choose a mount point outside"),
    ],
)
def test_places_that_cannot_be_used_are_named(
    tmp_path: Path, runtime_dir: Path, lower: str, point: str, message: str
) -> None:
    (tmp_path / "lower/inside").mkdir(parents=True)
    (tmp_path / "mount").mkdir()
    (tmp_path / "file").touch()
    point = str(tmp_path / point)
    with pytest.raises(AttachError, match=message):
        daemonise(str(tmp_path / lower), point, MountOptions.parse([], point), SegmentPaths.of("default"))
    assert mount_kinds(point) == []


def test_the_commands(tmp_path: Path, runtime_dir: Path) -> None:
    lower, point = tmp_path / "lower", tmp_path / "mount point"
    lower.mkdir()
    point.mkdir()
    (lower / "file").write_text("x")

    def tmem(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "tmem.cli.main", *arguments], capture_output=True, text=True, timeout=30
        )

    try:
        mounted = tmem("mount", lower, point, "-o", "timeout=0")
        assert (mounted.returncode, mounted.stdout, mounted.stderr) == (0, "", "")
        assert (point / "file").read_text() == "x"
        assert "carries a tmem mount already" in tmem("mount", lower, point).stderr
        wrong = tmem("mount", lower, point, "-o", "colour=blue")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
        unmounted = tmem("umount", point)
        assert (unmounted.returncode, unmounted.stdout, unmounted.stderr) == (0, "", "")
        assert mount_kinds(point) == []
        assert tmem("umount", point).returncode == 1
    finally:
        mounts.sweep(str(point))
        if mount_kinds(point):
            mounts.umount(str(point), lazily=True)


def test_a_mount_in_the_foreground_ends_with_ctrl_c(tmp_path: Path, runtime_dir: Path) -> None:
    lower, point = tmp_path / "lower", tmp_path / "mount"
    lower.mkdir()
    point.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "tmem.cli.main", "mount", lower, point, "-f"])
    try:
        while not mount_kinds(point):
            assert process.poll() is None
        point.stat()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert mount_kinds(point) == []
    finally:
        process.kill()
        process.wait()
        mounts.sweep(str(point))


def test_an_ordinary_user_mounts_with_fusermount(tmp_path: Path) -> None:
    """In a process of the user nobody, when we are root ourselves."""
    if shutil.which("fusermount3") is None:
        pytest.skip("needs fusermount3")
    base = Path(tempfile.mkdtemp(prefix="tmem-test-"))
    code = """
import os, sys
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.chdir(sys.argv[1])
os.mkdir("run"); os.mkdir("lower"); os.mkdir("mount")
os.environ["TMEM_RUNTIME_DIR"] = os.path.abspath("run")
from tmem.cli.main import run
assert run(["mount", "lower", "mount", "-o", "timeout=0"]) == 0
try:
    open("mount/file", "w").write("text")
    assert open("lower/file").read() == "text"
    file = open("mount/file")
    assert run(["mount", "--restart", "mount"]) == 0
    assert file.read(2) == "te"
    assert run(["umount", "mount"]) == 1
    file.close()
finally:
    status = run(["umount", "mount"])
assert status == 0
assert os.listdir("mount") == []
"""
    try:
        base.chmod(0o777)
        command = [sys.executable, "-c", code, str(base)]
        if os.geteuid() == 0:  # a FUSE device that nobody may open, in a mount namespace of its own
            os.mknod(base / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
            (base / "fuse").chmod(0o666)
            bind = 'mount --bind "$0" /dev/fuse && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", bind, str(base / "fuse"), *command]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if "No module named" in result.stderr:
            pytest.skip("needs an installation that the user nobody can read")
        assert result.returncode == 0, result.stderr
        assert "is in use: close the files open on it" in result.stderr
    finally:
        if mount_kinds(base / "mount"):
            mounts.detach(str(base / "mount"))
        shutil.rmtree(base)


def test_a_daemon_of_another_version_can_be_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade, before the mounts have been restarted."""
    told = json.dumps({"hit_reads": 7, "counted_by_a_later_version": 1}).encode()
    monkeypatch.setattr(os, "getxattr", lambda path, name: told)
    statistics = place.statistics()
    assert (statistics.hit_reads, statistics.ahead_pages) == (7, 0)
