"""The kinds of object that operations are tried on: each stages ``x`` and what it needs beside it."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from .compare import GROUP_OBJ, MASK, OTHERS, USER, USER_OBJ, acl

CONTENT = bytes(range(1, 251)) * 24  # 6000 bytes, more than a page
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
LIST = acl((USER_OBJ, 7, -1), (USER, 6, 1236), (GROUP_OBJ, 4, -1), (MASK, 6, -1), (OTHERS, 0, -1))
SMALL_LIST = acl((USER_OBJ, 6, -1), (GROUP_OBJ, 4, -1), (OTHERS, 4, -1))
OWNER_ID, FURTHER_GROUP = 1234, 2345

KINDS: dict[str, Callable[[Path], object]] = {}


def kind(build: Callable[[Path], object]) -> Callable[[Path], object]:
    """Register how a kind of ``x`` is staged."""
    KINDS[build.__name__] = build
    return build


def own(path: Path, mode: int, uid: int = OWNER_ID, gid: int = OWNER_ID) -> None:
    os.chown(path, uid, gid, follow_symlinks=False)
    if not path.is_symlink():
        path.chmod(mode)


def a_file(path: Path, mode: int, content: bytes = CONTENT) -> None:
    path.write_bytes(content)
    own(path, mode)


@kind
def file(case: Path) -> None:
    a_file(case / "x", 0o640)


@kind
def open_file(case: Path) -> None:
    a_file(case / "x", 0o666)


@kind
def set_id_program(case: Path) -> None:
    a_file(case / "x", 0o6777)


@kind
def set_gid_file(case: Path) -> None:
    a_file(case / "x", 0o2666)


@kind
def roots_file(case: Path) -> None:
    (case / "x").write_bytes(CONTENT)
    own(case / "x", 0o644, 0, 0)


@kind
def capable_file(case: Path) -> None:
    a_file(case / "x", 0o777)
    os.setxattr(case / "x", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))


@kind
def listed_file(case: Path) -> None:
    a_file(case / "x", 0o640)
    os.setxattr(case / "x", ACCESS, LIST)
    os.setxattr(case / "x", "user.colour", b"blue")


@kind
def linked_file(case: Path) -> None:
    a_file(case / "x", 0o664)
    os.link(case / "x", case / "h")


@kind
def sparse_file(case: Path) -> None:
    a_file(case / "x", 0o666, b"head")
    os.truncate(case / "x", 300_000)


@kind
def empty_directory(case: Path) -> None:
    (case / "x").mkdir()
    own(case / "x", 0o755)


@kind
def directory(case: Path) -> None:
    empty_directory(case)
    a_file(case / "x/z", 0o644)
    (case / "x/s").mkdir()


@kind
def set_gid_directory(case: Path) -> None:
    empty_directory(case)
    own(case / "x", 0o2777, gid=FURTHER_GROUP)


@kind
def sticky_directory(case: Path) -> None:
    (case / "x").mkdir()
    a_file(case / "x/z", 0o666)
    own(case / "x", 0o1777, 0, 0)


@kind
def listed_directory(case: Path) -> None:
    empty_directory(case)
    own(case / "x", 0o777)
    os.setxattr(case / "x", DEFAULT, LIST)


@kind
def link(case: Path) -> None:
    a_file(case / "y", 0o666)
    (case / "x").symlink_to("y")
    own(case / "x", 0)


@kind
def dangling_link(case: Path) -> None:
    (case / "x").symlink_to("nowhere")


@kind
def loop(case: Path) -> None:
    (case / "x").symlink_to("x")


@kind
def pipe(case: Path) -> None:
    os.mkfifo(case / "x")
    own(case / "x", 0o666)


@kind
def bound_socket(case: Path) -> None:
    os.mknod(case / "x", stat.S_IFSOCK)
    own(case / "x", 0o666)


@kind
def device(case: Path) -> None:
    os.mknod(case / "x", stat.S_IFCHR, os.makedev(1, 3))
    own(case / "x", 0o666)


@kind
def nothing(case: Path) -> None:
    pass


@kind
def nothing_in_sticky(case: Path) -> None:
    case.chmod(0o1777)


@kind
def nothing_in_set_gid(case: Path) -> None:
    os.chown(case, 0, FURTHER_GROUP)
    case.chmod(0o2777)


@kind
def nothing_in_locked(case: Path) -> None:
    case.chmod(0o555)


@kind
def nothing_in_listed(case: Path) -> None:
    os.setxattr(case, DEFAULT, LIST)


@kind
def file_in_sticky(case: Path) -> None:
    case.chmod(0o1777)
    a_file(case / "x", 0o666)


@kind
def file_in_locked(case: Path) -> None:
    case.chmod(0o555)
    a_file(case / "x", 0o666)
