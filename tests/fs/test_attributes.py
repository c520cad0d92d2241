"""Attributes: the mount shows and changes those of the lower files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until

from .conftest import Mounter, Place
from .underneath import Underneath, write

FIELDS = ["st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_rdev", "st_blocks", "st_ino"]
FIELDS += ["st_mtime_ns", "st_ctime_ns", "st_atime_ns"]
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: acts as another user")


def shown(path: Path) -> dict[str, int]:
    status = path.lstat()
    return {field: getattr(status, field) for field in FIELDS}


def as_nobody(code: str) -> None:
    """Run Python code as the user nobody."""
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n{code}",
        ],
        check=True,
        timeout=60,
    )


def test_attributes_are_the_lower_ones(place: Place) -> None:
    (place.lower / "file").write_bytes(b"x" * 12345)
    (place.lower / "directory").mkdir(mode=0o711)
    (place.lower / "link").symlink_to("nowhere")
    for name in ("file", "directory", "link", "."):
        assert shown(place.point / name) == shown(place.lower / name)


@pytest.mark.parametrize("loop", ["native", "fast"])
@pytest.mark.parametrize("seconds", [13_000_000_000, -2_000_000_000], ids=["2381", "1906"])
def test_times_of_any_year(mounter: Mounter, underneath: Underneath, seconds: int, loop: str) -> None:
    """Nanoseconds since 1970 have more than 63 bits from 2262 on."""
    place = mounter(f"loop={loop}")
    lower, path = place.lower / "file", place.point / "file"

    def is_the_same() -> bool:
        one, other = lower.stat(), path.stat()
        return (one.st_mtime_ns, one.st_size) == (other.st_mtime_ns, other.st_size)

    lower.write_bytes(b"x" * 5000)
    os.utime(lower, ns=(1, seconds * 10**9 + 123456789))
    with path.open("rb", buffering=0) as file:
        assert is_the_same()
        assert file.read() == b"x" * 5000
        underneath(write, lower, 4999, b"yz")
        underneath(os.utime, lower, (1, seconds + 1))
        wait_until(is_the_same, what="the change shows")
        assert os.pread(file.fileno(), 10, 4998) == b"xyz"
    os.utime(path, ns=(1, seconds * 10**9 + 987654321))
    assert is_the_same()
    with path.open("r+b", buffering=0) as file:
        file.write(b"w")
    assert lower.read_bytes() == b"w" + b"x" * 4998 + b"yz"
    assert is_the_same()


def test_mode_owner_and_times_can_be_changed(place: Place) -> None:
    path = place.point / "file"
    path.write_text("x")
    path.chmod(0o4751)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    lower = (place.lower / "file").stat()
    assert (lower.st_mode & 0o7777, lower.st_atime_ns, lower.st_mtime_ns) == (
        0o4751,
        1_000_000_001,
        2_000_000_002,
    )
    os.utime(path)
    assert path.stat().st_mtime_ns > 1_700_000_000_000_000_000


@needs_root
def test_owner_can_be_changed_of_files_and_of_links(place: Place) -> None:
    (place.point / "file").write_text("x")
    (place.point / "link").symlink_to("file")
    os.chown(place.point / "file", 1234, 5678)
    os.lchown(place.point / "link", 4321, -1)
    assert shown(place.lower / "file")["st_gid"] == 5678
    assert shown(place.lower / "link")["st_uid"] == 4321
    os.utime(place.point / "link", ns=(5, 6), follow_symlinks=False)
    assert shown(place.lower / "link")["st_mtime_ns"] == 6
    assert shown(place.lower / "file")["st_mtime_ns"] != 6


def test_extended_attributes(place: Place) -> None:
    path = place.point / "file"
    path.touch()
    os.setxattr(path, "user.colour", b"blue")
    assert os.getxattr(place.lower / "file", "user.colour") == b"blue"
    assert os.getxattr(path, "user.colour") == b"blue"
    assert "user.colour" in os.listxattr(path)
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.colour", b"red", os.XATTR_CREATE)
    os.removexattr(path, "user.colour")
    with pytest.raises(OSError, match="No data") as failure:
        os.getxattr(path, "user.colour")
    assert failure.value.errno == errno.ENODATA


def test_the_daemon_answers_on_the_root_without_listing_it(place: Place) -> None:
    assert int(os.getxattr(place.point, "user.tmem.pid")) == place.pid
    assert os.listxattr(place.point) == os.listxattr(place.lower)


def test_statfs_shows_the_lower_file_system(place: Place) -> None:
    mount, lower = os.statvfs(place.point), os.statvfs(place.lower)
    assert (mount.f_blocks, mount.f_bsize, mount.f_files, mount.f_namemax) == (
        lower.f_blocks,
        lower.f_bsize,
        lower.f_files,
        lower.f_namemax,
    )


def test_the_callers_umask_is_applied_once(place: Place) -> None:
    old = os.umask(0o027)
    try:
        (place.point / "file").touch(mode=0o666)
        (place.point / "directory").mkdir(mode=0o777)
    finally:
        os.umask(old)
    assert shown(place.lower / "file")["st_mode"] & 0o777 == 0o640
    assert shown(place.lower / "directory")["st_mode"] & 0o777 == 0o750


@needs_root
def test_another_user_owns_what_he_makes_and_is_refused_what_is_not_his(
    world_readable: Path, mounter: Mounter
) -> None:
    place = mounter("timeout=0,allow_other", lower=world_readable / "lower", point=world_readable / "mount")
    place.lower.chmod(0o777)
    (place.lower / "secret").write_text("secret")
    (place.lower / "secret").chmod(0o600)
    as_nobody(
        f"""
os.chdir({str(place.point)!r})
open('file', 'w').write('x')
os.mkdir('directory'); os.symlink('file', 'link'); os.mkfifo('pipe'); os.mknod('plain', 0o100644)
try: open('secret')
except PermissionError: pass
else: raise SystemExit('could read the secret')
"""
    )
    for name in ("file", "directory", "link", "pipe", "plain"):
        assert shown(place.lower / name)["st_uid"] == shown(place.lower / name)["st_gid"] == NOBODY


@needs_root
def test_without_allow_other_nobody_else_gets_in(world_readable: Path, mounter: Mounter) -> None:
    place = mounter("timeout=0", lower=world_readable / "lower", point=world_readable / "mount")
    place.lower.chmod(0o777)
    as_nobody(
        f"""
try: os.listdir({str(place.point)!r})
except PermissionError: pass
else: raise SystemExit('got in')
"""
    )


@needs_root
def test_a_set_group_id_directory_gives_its_group(world_readable: Path, mounter: Mounter) -> None:
    place = mounter("timeout=0,allow_other", lower=world_readable / "lower", point=world_readable / "mount")
    os.chown(place.lower, 0, 4242)
    place.lower.chmod(0o2777)
    as_nobody(f"open({str(place.point / 'file')!r}, 'w')")
    assert shown(place.lower / "file")["st_gid"] == 4242


@needs_root
def test_a_write_takes_set_user_id_away(world_readable: Path, mounter: Mounter) -> None:
    place = mounter("timeout=0,allow_other", lower=world_readable / "lower", point=world_readable / "mount")
    (place.lower / "program").write_text("old")
    (place.lower / "program").chmod(0o6777)
    as_nobody(f"open({str(place.point / 'program')!r}, 'r+').write('new')")
    assert shown(place.lower / "program")["st_mode"] & 0o7777 == 0o777


@needs_root
def test_access_control_lists_are_enforced(world_readable: Path, mounter: Mounter) -> None:
    place = mounter("timeout=0,allow_other", lower=world_readable / "lower", point=world_readable / "mount")
    path = place.lower / "file"
    path.write_text("x")
    path.chmod(0o664)
    os.chown(path, 0, NOBODY)
    # version 2; user::rw- group::--- mask::rw- other::r--: the mode shows the mask, the group has nothing
    acl = b"\x02\x00\x00\x00" + b"".join(
        tag.to_bytes(2, "little") + rights.to_bytes(2, "little") + b"\xff\xff\xff\xff"
        for tag, rights in ((1, 6), (4, 0), (0x10, 6), (0x20, 4))
    )
    try:
        os.setxattr(path, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("needs access control lists on the temporary directory's file system")
    as_nobody(
        f"""
try: open({str(place.point / "file")!r})
except PermissionError: pass
else: raise SystemExit('read in spite of the list')
"""
    )
