"""Quotas and reserved blocks: a user who has no room left gets what the lower says, and pages stay right."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.fs.acting import Caller, within_limits

from .conftest import Mounter
from .images import file_system, loop_device, make_ext4, mounted, needs

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

USER = 65534
BLOCK = 64 << 10
LIMIT = 8 << 20
NO_ROOM = (
    f"BLOCK, LIMIT = {BLOCK}, {LIMIT}"
    """
import errno, json, os, sys

def block(number):
    return number.to_bytes(8, "big") * (BLOCK // 8)

def said(what, *arguments):
    try:
        what(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def write(number):
    done = 0
    while done < BLOCK:  # a part is written, then the error comes
        done += os.pwrite(file, block(number)[done:], number * BLOCK + done)

os.chdir(sys.argv[1])
for name in ("one", "two"):
    open(name, "wb").write(block(1))
file = os.open("full", os.O_RDWR | os.O_CREAT | os.O_SYNC)
count = 0
while (told := said(write, count)) == "done":
    count += 1
    assert count * BLOCK <= 2 * LIMIT, "nothing limits it"
results = {
    "write": told,
    "append": said(open("one", "ab", 0).write, block(2)),
    "write again": said(os.pwrite, file, block(3), 0),
    "create": said(lambda: open("new", "xb", 0).write(block(4))),
    "mkdir": said(os.mkdir, "directory"),
    "symlink": said(os.symlink, "n" * 250, "symlink"),
    "setxattr": said(os.setxattr, "two", "user.large", b"v" * 3000),
    "rename": said(os.rename, "one", "renamed"),
    "link": said(os.link, "two", "linked"),
    "extend": said(os.truncate, "two", 4 * BLOCK),
    "truncate": said(os.truncate, "full", BLOCK),
    "write once more": said(write, 1),
}
print(json.dumps([count, results]))
"""
)


def use_up(directory: Path) -> tuple[int, dict[str, str]]:
    """Have a user write until there is no room; how many blocks, and what all that it tried then came to."""
    command = [sys.executable, "-c", NO_ROOM, str(directory)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, user=USER, group=USER, extra_groups=[])
    count, results = json.loads(ran.stdout)
    return count, results


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_nothing_else_is_lost_within_limits() -> None:
    """The kernel has checked what the caller may do, also by groups that are not known here."""

    def mine() -> tuple[str, int]:
        status = Path("/proc/thread-self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return fields["Uid"].split()[3], int(fields["CapEff"], 16)

    user, rights = before = mine()
    assert user == "0"
    with within_limits(Caller(USER, USER, 0)):
        assert mine() == (str(USER), rights & ~(1 << 24))  # CAP_SYS_RESOURCE
    assert mine() == before
    for nobody in (None, Caller(0, 0, 0)):
        with within_limits(nobody):
            assert mine() == before


@pytest.fixture
def limited() -> Iterator[tuple[Path, Path]]:
    """Two directories of a user with a quota each: subvolumes of a btrfs."""
    needs("mkfs.btrfs", "btrfs")
    with file_system("btrfs") as base:
        subprocess.run(["btrfs", "quota", "enable", base], check=True)
        directories = base / "plain", base / "lower"
        for directory in directories:
            subprocess.run(["btrfs", "-q", "subvolume", "create", directory], check=True)
            subprocess.run(["btrfs", "qgroup", "limit", str(LIMIT), directory], check=True)
            os.chown(directory, USER, USER)
        yield directories


def test_a_quota_holds_as_on_the_lower(
    limited: tuple[Path, Path], segment: "_native.Segment", mounter: Mounter, world_readable: Path
) -> None:
    plain, lower = limited
    place = mounter("allow_other", lower=lower, point=world_readable)
    there, here = use_up(plain), use_up(place.point)
    assert here[1] == there[1]
    assert here[1]["write"] == errno.errorcode[errno.EDQUOT]
    assert abs(here[0] - there[0]) * BLOCK <= LIMIT // 4
    for _ in range(2):  # the second time from the pool
        assert contents(place.point) == contents(lower)


@pytest.fixture
def reserved(tmp_path: Path, world_readable: Path) -> Iterator[tuple[Path, Path]]:
    """Two file systems of a user, each with a quarter that only root may fill."""
    needs("mkfs.ext4", "tune2fs")
    directories = world_readable / "plain", world_readable / "lower"
    with contextlib.ExitStack() as stack:
        for directory in directories:
            image = tmp_path / directory.name
            make_ext4(image, {})
            subprocess.run(["tune2fs", "-m", "25", image], check=True, stdout=subprocess.DEVNULL)
            device = stack.enter_context(loop_device(image))
            stack.enter_context(mounted(device, directory))
            os.chown(directory, USER, USER)
        yield directories


def test_reserved_blocks_are_root_s_alone(
    reserved: tuple[Path, Path], segment: "_native.Segment", mounter: Mounter, world_readable: Path
) -> None:
    plain, lower = reserved
    place = mounter("allow_other", lower=lower, point=world_readable / "mount")
    there, here = use_up(plain), use_up(place.point)
    assert here == there
    assert here[1]["write"] == errno.errorcode[errno.ENOSPC]
    for _ in range(2):
        assert contents(place.point) == contents(lower)
    with (place.point / "full").open("r+b", buffering=0) as file:
        for number in range(16):  # more than the user had left free
            assert os.pwrite(file.fileno(), bytes([number]) * BLOCK, 1 << 30 | number * BLOCK) == BLOCK
