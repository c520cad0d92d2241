"""File systems of a test's own: an ext4 in an image, mounted by a loop device, that is taken down again."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.fs import syscalls

MADE_AT = 1_600_000_000
"""When everything in an image was made, in seconds since 1970: always the same, as in reproducible builds."""


def needs(*programs: str) -> None:
    """Skip where loop devices or a program are missing."""
    if not Path("/dev/loop-control").exists():
        pytest.skip("needs loop devices")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def make_ext4(image: Path, files: dict[str, bytes], size: int = 16 << 20) -> None:
    """Make an image with these files; two made alike have equal inode numbers, handles and time stamps."""
    tree = image.with_suffix(".tree")
    tree.mkdir()
    for name, content in files.items():
        (tree / name).write_bytes(content)
        os.utime(tree / name, (MADE_AT, MADE_AT))
    os.utime(tree, (MADE_AT, MADE_AT))
    with image.open("wb") as file:
        file.truncate(size)
    fixed = "11111111-2222-3333-4444-555555555555"
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal", "-U", fixed, "-E"]
    subprocess.run(
        [*command, f"hash_seed={fixed},lazy_itable_init=0", "-d", str(tree), str(image)],
        check=True,
        env={**os.environ, "E2FSPROGS_FAKE_TIME": str(MADE_AT), "SOURCE_DATE_EPOCH": str(MADE_AT)},
        capture_output=True,
    )
    shutil.rmtree(tree)
    for name in files:  # which mkfs takes from the tree
        for field, value in (("ctime", f"@{MADE_AT}"), ("ctime_extra", "0")):
            command = ["debugfs", "-w", "-R", f"set_inode_field {name} {field} {value}", str(image)]
            subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def loop_device(file: Path, device: str = "", direct: bool = False) -> Iterator[str]:
    """Yield a loop device with the file's content: `device`, or any that is free."""
    wanted = [device] if device else ["--find"]
    command = ["losetup", *wanted, "--show", f"--direct-io={'on' if direct else 'off'}", str(file)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs a loop device: {made.stderr.strip()}")
    name = device or made.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@contextlib.contextmanager
def mounted(device: str, point: Path, options: str = "noatime") -> Iterator[None]:
    """Have the file system on `device` at `point`."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", options, device, str(point)], check=True)
    try:
        yield
    finally:
        syscalls.umount(str(point), syscalls.MNT_DETACH)  # a test that fails leaves its users to be ended


MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-O", "^has_journal", "-I", "256", "-i", "8192"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
}


@contextlib.contextmanager
def file_system(kind: str) -> Iterator[Path]:
    """A directory that every user can enter, on a file system of its own: ext4, btrfs, xfs or tmpfs.

    Its image is in memory: on a disk, removing thousands of cases takes longer than trying them.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="tmem-test-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        source, options = "tmpfs", "size=256m"
        if kind in MAKE:
            image = stack.enter_context(tempfile.NamedTemporaryFile(prefix="tmem-test-", dir="/dev/shm"))
            os.truncate(image.name, 1 << 30)
            subprocess.run([*MAKE[kind], image.name], check=True, capture_output=True)
            source, options = image.name, "loop"
        subprocess.run(["mount", "-t", kind, "-o", options, source, str(directory)], check=True)
        stack.callback(subprocess.run, ["umount", str(directory)], check=True)
        directory.chmod(0o755)
        yield directory
