"""Operations on names: making, removing, renaming and listing."""

# The calls themselves are what is tested:
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH211

import os
import socket
import stat
from pathlib import Path

from tmem.fs import syscalls

from .register import opened, operation, told, variants


@operation
def unlink(case: str) -> object:
    os.unlink(f"{case}/x")
    return None


@operation
def rmdir(case: str) -> object:
    os.rmdir(f"{case}/x")
    return None


@operation
def rmdir_dot(case: str) -> object:
    os.rmdir(f"{case}/x/.")
    return None


@variants(
    away=("x", "n"),
    onto_itself=("x", "x"),
    onto_link=("x", "h"),
    onto_file=("x", "y"),
    from_file=("y", "x"),
    onto_directory=("x", "e"),
    from_directory=("e", "x"),
    into_directory=("x", "e/n"),
    into_itself=("x", "x/n"),
    out=("x/z", "n"),
    dot=("x/.", "n"),
)
def rename(case: str, names: object) -> object:
    assert isinstance(names, tuple)
    neighbours(case)
    os.rename(f"{case}/{names[0]}", f"{case}/{names[1]}")
    return None


@variants(
    noreplace_free=("x", "n", 1),
    noreplace=("x", "y", 1),
    exchange=("x", "y", 2),
    exchange_directory=("x", "e", 2),
    exchange_nothing=("x", "n", 2),
    whiteout=("x", "n", 4),
    wrong=("x", "n", 3),
    unknown=("x", "n", 64),
)
def rename2(case: str, what: object) -> object:
    assert isinstance(what, tuple)
    neighbours(case)
    old, new, flags = what
    directory = os.open(case, os.O_PATH)
    try:
        syscalls.renameat2(directory, old.encode(), directory, new.encode(), flags)
    finally:
        os.close(directory)
    return None


def neighbours(case: str) -> None:
    """Have a file ``y`` and a directory ``e`` of the user's own beside ``x``, if he may make them."""
    try:
        if not os.path.lexists(f"{case}/y"):
            Path(f"{case}/y").write_bytes(b"neighbour")
        os.mkdir(f"{case}/e")
    except PermissionError:
        pass


@operation
def link_to(case: str) -> object:
    os.link(f"{case}/x", f"{case}/n", follow_symlinks=False)
    return None


@operation
def link_followed(case: str) -> object:
    os.link(f"{case}/x", f"{case}/n", follow_symlinks=True)
    return None


@variants(here="x", inside="x/n", dot="x/.")
def symlink(case: str, name: object) -> object:
    os.symlink("somewhere", f"{case}/{name}")
    return None


@operation
def symlink_long(case: str) -> object:
    os.symlink("l" * 4095, f"{case}/n")
    return os.readlink(f"{case}/n")


@variants(plain=("x", 0o777), inside=("x/n", 0o750), sticky=("x", 0o1777), set_gid=("x", 0o2755))
def mkdir(case: str, what: object) -> object:
    assert isinstance(what, tuple)
    os.mkdir(f"{case}/{what[0]}", what[1])
    return None


@variants(none=0, group=0o027, everything=0o777)
def umask(case: str, mask: object) -> object:
    assert isinstance(mask, int)
    old = os.umask(mask)
    try:
        os.mkdir(f"{case}/m", 0o777)
        os.mkfifo(f"{case}/p", 0o666)
        os.close(os.open(f"{case}/f", os.O_WRONLY | os.O_CREAT, 0o666))
        os.symlink("target", f"{case}/l")
    finally:
        os.umask(old)
    return None


@variants(
    file=(stat.S_IFREG | 0o640, 0),
    bare=(0o644, 0),
    set_id=(stat.S_IFREG | 0o6755, 0),
    set_gid=(stat.S_IFREG | 0o2644, 0),
    pipe=(stat.S_IFIFO | 0o666, 0),
    socket=(stat.S_IFSOCK | 0o600, 0),
    device=(stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    block=(stat.S_IFBLK | 0o600, os.makedev(7, 200)),
    whiteout=(stat.S_IFCHR, 0),
    directory=(stat.S_IFDIR | 0o755, 0),
)
def mknod(case: str, what: object) -> object:
    assert isinstance(what, tuple)
    os.mknod(f"{case}/x", *what)
    return None


@variants(plain=0o666, set_id=0o6777, set_gid=0o2666, sticky=0o1666)
def create(case: str, mode: object) -> object:
    assert isinstance(mode, int)
    descriptor = opened(case, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.write(descriptor, b"new")
        return told(os.fstat(descriptor)), os.pread(descriptor, 10, 0)
    finally:
        os.close(descriptor)


@operation
def create_read_only(case: str) -> object:
    """A file that its maker may not open again, but writes."""
    descriptor = opened(case, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o400)
    try:
        os.write(descriptor, b"new")
        os.ftruncate(descriptor, 2)
        return told(os.fstat(descriptor))
    finally:
        os.close(descriptor)


@operation
def create_inside(case: str) -> object:
    os.close(os.open(f"{case}/x/n", os.O_WRONLY | os.O_CREAT, 0o666))
    return told(os.stat(f"{case}/x/n"))


@operation
def unlink_inside(case: str) -> object:
    os.unlink(f"{case}/x/z")
    return None


@operation
def bind(case: str) -> object:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{case}/x")
    return None


@operation
def readlink(case: str) -> object:
    return os.readlink(f"{case}/x")


@operation
def list_directory(case: str) -> object:
    return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(f"{case}/x"))
