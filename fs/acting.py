"""Acting for the calling process: what it makes is its own from the start, and what it may not keep goes.

The daemon is root and the kernel has checked what the caller may do (default_permissions). So only what
follows from *who* it is must be done here: `acting_as` sets the file system user and group of the thread, as
a new file's owner, quota and a lower file system with rules of its own (NFS, vfat, BSD groups) want them, and
keeps the capabilities, which setfsuid takes, but for the one to go beyond quotas and into blocks that are
reserved. What takes room otherwise is done `within_limits` of who asks; `lost_bits` says which set-id bits a
change by the caller costs.
Threading: plain functions; these ids and capabilities are a thread's own. So is the umask of any but the
main thread, if `threads_may_act`.
"""

import contextlib
import ctypes
import errno
import functools
import os
import stat
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3

if TYPE_CHECKING:
    from pyfuse3 import RequestContext

_libc = ctypes.CDLL(None, use_errno=True)
_HEADER = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
"""Of capget and capset: version 3, the calling thread."""

_CLONE_FS = 0x200
_SET_IDS = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that a request came from; `pid` is 0 if it cannot be seen from here."""

    uid: int
    gid: int
    pid: int

    @classmethod
    def of(cls, ctx: "RequestContext") -> "Caller":
        """Return the caller of a request."""
        return cls(ctx.uid, ctx.gid, ctx.pid)

    def is_member(self, gid: int) -> bool:
        """Say whether the process is in the group; False if it has ended."""
        if gid == self.gid:
            return True
        try:
            return self.pid > 0 and gid in pyfuse3.get_sup_groups(self.pid)
        except (OSError, RuntimeError):
            return False


_KEEP_SET_IDS = 1 << 4  # CAP_FSETID
_EXCEED_LIMITS = 1 << 24  # CAP_SYS_RESOURCE


@contextlib.contextmanager
def losing_set_ids() -> Iterator[None]:
    """Lack the right to keep set-id bits (CAP_FSETID), as users do, for as long as this lasts. OSError."""
    before = ctypes.create_string_buffer(24)
    _check(_libc.capget(_HEADER, before))
    (effective,) = struct.unpack_from("=I", before)
    fewer = ctypes.create_string_buffer(before.raw, 24)
    struct.pack_into("=I", fewer, 0, effective & ~_KEEP_SET_IDS)
    _check(_libc.capset(_HEADER, fewer))
    try:
        yield
    finally:
        _check(_libc.capset(_HEADER, before))


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def threads_may_act() -> bool:
    """Say whether others than the main thread can act as somebody: have a umask of their own."""
    try:
        return _threads_can_part()
    except RuntimeError:  # no thread can be had now
        return False


@functools.cache
def _threads_can_part() -> bool:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(_part()), name="tmem-umask")
    thread.start()
    thread.join()
    return results == [True]


def _part() -> bool:
    """Give the calling thread a umask (and working directory) of its own; False where that is forbidden."""
    return not _libc.unshare(_CLONE_FS)  # nothing to do the second time


@contextlib.contextmanager
def acting_as(ctx: "RequestContext") -> Iterator[None]:
    """Make files as the caller, with its user, group and umask, for as long as this lasts.

    On the main thread, whose umask others may share, this must not wait. On others only if `threads_may_act`.
    """
    if threading.get_ident() != threading.main_thread().ident and not _part():
        raise PermissionError(errno.EPERM, "a thread may not have a umask of its own")
    old_umask = os.umask(ctx.umask)
    try:
        if os.geteuid() != 0 or (ctx.uid == 0 and ctx.gid == 0):
            yield
        else:
            with _file_system_ids(ctx.uid, ctx.gid):
                yield
    finally:
        os.umask(old_umask)


@contextlib.contextmanager
def within_limits(caller: Caller | None) -> Iterator[None]:
    """Take room as the caller may, for as long as this lasts; None is root, whom nothing limits."""
    if caller is None or caller.uid == 0 or os.geteuid() != 0:
        yield
    else:
        with _file_system_ids(caller.uid, 0):
            yield


@contextlib.contextmanager
def _file_system_ids(uid: int, gid: int) -> Iterator[None]:
    """Be these for the lower, with all capabilities, but the one of going beyond limits for root only."""
    before = ctypes.create_string_buffer(24)
    _libc.capget(_HEADER, before)
    kept = before
    if uid:
        (effective,) = struct.unpack_from("=I", before)
        kept = ctypes.create_string_buffer(before.raw, 24)
        struct.pack_into("=I", kept, 0, effective & ~_EXCEED_LIMITS)
    if gid:
        _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        _libc.capset(_HEADER, kept)
        yield
    finally:
        _libc.setfsuid(0)
        if gid:
            _libc.setfsgid(0)
        _libc.capset(_HEADER, before)


def lost_bits(status: os.stat_result, caller: Caller | None) -> int:
    """Return the set-id bits that writing, truncating or giving away a file costs; None is any user."""
    mode = status.st_mode
    if not mode & _SET_IDS or not stat.S_ISREG(mode) or (caller is not None and caller.uid == 0):
        return 0
    lost = mode & stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or caller is None or not caller.is_member(status.st_gid)):
        lost |= stat.S_ISGID
    return lost


def drop_set_ids(target: int | str, status: os.stat_result, caller: Caller | None) -> bool:
    """Take those bits away from the file, as the kernel does; True if there were. `status` is from before."""
    lost = lost_bits(status, caller)
    if lost:
        os.chmod(target, stat.S_IMODE(status.st_mode) & ~lost)  # noqa: PTH101 - may be a descriptor
    return bool(lost)
