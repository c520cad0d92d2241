"""What is mounted, and taking mounts down: look up, sweep dead ones, unmount and wait for the daemon.

Reads /proc/self/mountinfo, because a dead FUSE mount answers no other question. A mount is found by the
file system type ``fuse.tmem``; its daemon answers for itself through extended attributes of the root
directory that are not listed: ``user.tmem.pid``, ``user.tmem.statistics`` and ``user.tmem.restart``.
Threading: plain blocking functions.
"""

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import procfiles
from tmem.backends.processes import Process
from tmem.errors import AttachError
from tmem.fs import syscalls
from tmem.fs.statistics import MountStatistics, RestartStatus

KIND = "fuse.tmem"
PID_ATTRIBUTE = b"user.tmem.pid"
STATISTICS_ATTRIBUTE = b"user.tmem.statistics"
RESTART_ATTRIBUTE = b"user.tmem.restart"
_POLL_SECONDS = 0.02
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)
"""The last one is of a request on a ring of io_uring that has just been closed."""


@dataclass(frozen=True)
class Mounted:
    """One line of mountinfo."""

    mountpoint: str
    kind: str
    source: str


def mounts() -> list[Mounted]:
    """Return every mount that this process sees, the one on top of a mount point last."""
    found = []
    for line in procfiles.lines(procfiles.MOUNTS):
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        mountpoint = procfiles.unescape(before.split(" ")[4])
        found.append(Mounted(mountpoint, kind, procfiles.unescape(source)))
    return found


def top_mount(mountpoint: str) -> Mounted | None:
    """Return what is mounted on exactly `mountpoint` (absolute, resolved), or None."""
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == mountpoint), None)


def resolve(mountpoint: str) -> str:
    """Return `mountpoint` absolute and without symbolic links, never touching what is mounted on it."""
    path = Path(os.path.abspath(mountpoint))  # noqa: PTH100 - resolve() would stat a mount that may be dead
    return str(path.parent.resolve() / path.name)


def is_dead(mountpoint: str) -> bool:
    """Say whether the mount's daemon has gone and left it behind."""
    try:
        os.stat(mountpoint)  # noqa: PTH116
    except OSError as error:
        return error.errno in _DEAD
    return False


def sweep(mountpoint: str) -> bool:
    """Take down mounts of ours on `mountpoint` whose daemons were killed; True if there were any."""
    swept = False
    while (top := top_mount(mountpoint)) is not None and top.kind == KIND and is_dead(mountpoint):
        detach(mountpoint)
        swept = True
    return swept


def detach(mountpoint: str) -> None:
    """Unmount lazily: it is gone from the tree at once."""
    _umount(mountpoint, lazily=True)


def statistics(mountpoint: str) -> MountStatistics:
    """Ask a mount's daemon for its statistics. AttachError if that is no mount of ours, or a dead one.

    Waits as long as the daemon does not answer; `asking` does not.
    """
    try:
        return parsed(os.getxattr(mountpoint, STATISTICS_ATTRIBUTE))
    except OSError as error:
        raise AttachError(
            f"{mountpoint} is no mount of tmem that answers ({error.strerror}): 'findmnt -t {KIND}' lists all"
        ) from None


def parsed(attribute: bytes) -> MountStatistics:
    """Return the statistics that a daemon told; 0 for what one of another version does not count."""
    told = json.loads(attribute)
    return MountStatistics(**{name: told.get(name, 0) for name in MountStatistics.__dataclass_fields__})


def daemon_of(mountpoint: str) -> Process | None:
    """Return the process that serves the mount, or None if it does not answer."""
    try:
        return Process.of(int(os.getxattr(mountpoint, PID_ATTRIBUTE)))
    except (OSError, ValueError):
        return None


def restart_status(mountpoint: str) -> RestartStatus:
    """Ask a mount's daemon about its restarts. AttachError if it does not answer or knows of none."""
    try:
        return RestartStatus(**json.loads(os.getxattr(mountpoint, RESTART_ATTRIBUTE)))
    except OSError as error:
        raise AttachError(_unanswered(mountpoint, error.errno or errno.EIO)) from error
    except (ValueError, TypeError) as error:  # of another version
        raise AttachError(_unanswered(mountpoint, errno.ENODATA)) from error


def _unanswered(mountpoint: str, code: int) -> str:
    """Say why there is no `restart_status`, and what to do."""
    if code in (errno.ENODATA, errno.EOPNOTSUPP):
        return f"the daemon of {mountpoint} cannot be restarted: unmount and mount it again"
    name = errno.errorcode.get(code, str(code))
    if code in _DEAD:
        return f"the daemon of {mountpoint} has ended ({name}): see its log, then mount there again"
    if code in (errno.EACCES, errno.EPERM):
        return f"the mount on {mountpoint} is another user's ({name}): run this as root"
    return f"cannot ask the daemon of {mountpoint} ({name}: {os.strerror(code)}): try again, or see its log"


def restart(mountpoint: str, timeout_seconds: float = 60) -> RestartStatus:
    """Have a mount's daemon go on with the code that is installed now; open files stay open.

    AttachError says why it goes on with its old code instead, or that it is no mount of ours.
    """
    mountpoint = resolve(mountpoint)
    top = top_mount(mountpoint)
    if top is None or top.kind != KIND:
        raise AttachError(f"{mountpoint} is no mount of tmem: 'findmnt -t {KIND}' lists them")
    before = restart_status(mountpoint)
    if before.under_way:
        raise AttachError(f"{mountpoint} is being restarted already: try again in a moment")
    daemon = Process(before.pid, before.start_ticks)
    pidfd = daemon.open_pidfd()  # None in another namespace of processes: who has the number there is spared
    if pidfd is None:
        raise AttachError(
            f"the daemon of {mountpoint} is not among the processes here: run this where it was mounted, "
            "such as in its container"
        )
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGUSR1)
    except PermissionError:
        raise AttachError(f"the mount on {mountpoint} is another user's: run this as root") from None
    finally:
        os.close(pidfd)
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        status = restart_status(mountpoint)  # waits while the code is being replaced
        if status.attempts != before.attempts and not status.under_way:
            if status.failure:
                raise AttachError(f"{mountpoint} goes on as before: {status.failure}")
            return status
        time.sleep(_POLL_SECONDS)
    raise AttachError(
        f"{mountpoint} was not restarted within {timeout_seconds:.0f} s: look at its daemon's log"
    )


def umount(mountpoint: str, lazily: bool = False, timeout_seconds: float = 30) -> None:
    """Unmount `mountpoint` and wait until its daemon has dropped its pool and ended.

    `lazily` takes it out of the tree although files are open; the daemon then serves those and is not waited
    for. AttachError if it is no mount of ours or still in use.
    """
    mountpoint = resolve(mountpoint)
    top = top_mount(mountpoint)
    if top is None or top.kind != KIND:
        raise AttachError(f"{mountpoint} is no mount of tmem: 'findmnt -t {KIND}' lists them")
    if sweep(mountpoint):
        return
    daemon = daemon_of(mountpoint)
    pidfd = daemon.open_pidfd() if daemon else None
    try:
        _umount(mountpoint, lazily)
        if pidfd is not None and not lazily and not select.select([pidfd], [], [], timeout_seconds)[0]:
            assert daemon is not None
            raise AttachError(
                f"{mountpoint} is unmounted, but its daemon is still busy: look at process {daemon.pid}"
            )
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _umount(mountpoint: str, lazily: bool) -> None:
    try:
        if os.geteuid() == 0:
            syscalls.umount(mountpoint, syscalls.MNT_DETACH if lazily else 0)
        else:
            _fusermount(mountpoint, lazily)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise AttachError(
                f"{mountpoint} is in use: close the files open on it ('fuser -vm {mountpoint}' lists them)"
            ) from None
        if error.errno == errno.EINVAL:  # somebody else was quicker
            return
        raise AttachError(
            f"cannot unmount {mountpoint}: {error.strerror}; run this as who mounted it, or as root"
        ) from None


def _fusermount(mountpoint: str, lazily: bool) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise AttachError("cannot unmount without fusermount3: install fuse3")
    result = subprocess.run(
        [program, "-u", *(["-z"] if lazily else []), "--", mountpoint],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        busy = "busy" in result.stderr.lower()
        raise OSError(errno.EBUSY if busy else errno.EIO, result.stderr.strip() or "fusermount3 failed")
