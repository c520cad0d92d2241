"""System calls that Python's `os` lacks: renameat2, fallocate, file handles, mount and umount, fanotify.

Each raises OSError like its neighbours in `os`. Paths are bytes or str; file descriptors may be O_PATH ones
unless said otherwise. Threading: plain functions, callable from any thread; errno is per thread (ctypes).
"""

import ctypes
import errno
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _UTIME_OMIT = -100, (1 << 30) - 2
_AT_EMPTY_PATH, _AT_HANDLE_FID, _AT_STATX_DONT_SYNC = 0x1000, 0x200, 0x4000
_STATX_MNT_ID, _STATX_MNT_ID_UNIQUE = 0x1000, 0x4000
_STX_MNT_ID = 144  # where struct statx has it
_HANDLE_ROOM = 128  # MAX_HANDLE_SZ
_STATFS_ROOM = 256  # struct statfs has 120 bytes on 64-bit machines, of which the first word is wanted

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_NOATIME = 1, 2, 4, 8, 16, 1024
MNT_DETACH = 2
FUSE_MAGIC = 0x65735546
"""See `file_system_type`."""


def _check(result: int, *names: str | bytes) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *(os.fsdecode(name) for name in names[:1]))
    return result


def renameat2(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int) -> None:
    """Rename `old_name` to `new_name`; `flags` are RENAME_NOREPLACE and RENAME_EXCHANGE of rename(2)."""
    _check(_libc.renameat2(old_dir, old_name, new_dir, new_name, ctypes.c_uint(flags)), old_name)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch or zero `length` bytes from `offset` on; `mode` is FALLOC_FL_ flags of fallocate(2)."""
    _check(_libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def utimens(path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set the times of a file; None leaves one as it is, whatever it is by then."""
    words: list[int] = []
    for time_ns in (atime_ns, mtime_ns):
        words += (0, _UTIME_OMIT) if time_ns is None else divmod(time_ns, 10**9)
    _check(_libc.utimensat(_AT_FDCWD, os.fsencode(path), struct.pack("=qqqq", *words), 0), path)


def file_handle(descriptor: int, to_open: bool = True) -> bytes | None:
    """Return the handle (type and opaque bytes) of the open file, or None if its file system has none.

    A handle holds the inode's generation, so it is never used again for another file. Unless it is `to_open`
    the file by, more file systems have one (from Linux 6.5 on).
    """
    room = ctypes.create_string_buffer(struct.pack("=Ii", _HANDLE_ROOM, 0), 8 + _HANDLE_ROOM)
    mount_id = ctypes.c_int()
    flags = _AT_EMPTY_PATH if to_open else _AT_EMPTY_PATH | _AT_HANDLE_FID
    if _libc.name_to_handle_at(descriptor, b"", room, ctypes.byref(mount_id), flags):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM, errno.EINVAL):
            return None
        raise OSError(code, os.strerror(code))
    size = int.from_bytes(room.raw[:4], "little" if struct.pack("=H", 1)[0] else "big")
    return room.raw[4 : 8 + size]


def open_handle(mount: int, handle: bytes, flags: int) -> int:
    """Open the file that `handle` names on the file system of `mount` (no O_PATH). ESTALE if it is gone.

    Needs CAP_DAC_READ_SEARCH.
    """
    room = ctypes.create_string_buffer(struct.pack("=I", len(handle) - 4) + handle)
    return _check(_libc.open_by_handle_at(mount, room, flags))


def mount_number(descriptor: int) -> int:
    """Return the number of the mount that the open file is on; from kernel 6.8 on it is never used again."""
    room = ctypes.create_string_buffer(256)  # struct statx
    wanted = ctypes.c_uint(_STATX_MNT_ID | _STATX_MNT_ID_UNIQUE)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC  # for that no server is asked
    _check(_libc.statx(descriptor, b"", flags, wanted, room))
    return int(struct.unpack_from("=Q", room, _STX_MNT_ID)[0])


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """Mount `source` on `target`."""
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), os.fsencode(data)
        ),
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """Unmount what is on top at `target`; with MNT_DETACH even while it is in use."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def file_system_type(descriptor: int) -> int:
    """Return the magic number of the kind of file system that the open file is on, as statfs(2) has it."""
    room = ctypes.create_string_buffer(_STATFS_ROOM)
    _check(_libc.fstatfs(descriptor, room))
    return ctypes.c_long.from_buffer(room).value & 0xFFFFFFFF


def fanotify_init(flags: int, event_flags: int) -> int:
    """Return the descriptor of a new fanotify group; `flags` and `event_flags` as in fanotify_init(2)."""
    return _check(_libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(event_flags)))


def fanotify_mark(group: int, flags: int, mask: int, directory: int, path: bytes) -> None:
    """Have the group told of the events in `mask`; arguments as in fanotify_mark(2)."""
    _check(_libc.fanotify_mark(group, ctypes.c_uint(flags), ctypes.c_uint64(mask), directory, path), path)
