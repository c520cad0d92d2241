"""The life of a mount: in the foreground, or as a daemon that is there when the caller goes on.

The daemon is forked before trio starts; a pipe tells the caller that the mount answers, or why not. Whatever
happens, the mount point is left unmounted and the pool destroyed; after SIGKILL the next mount at the same
place cleans up. Not for what runs meanwhile: `serving`; nor for unmounting from outside: `mounts`.
"""

import contextlib
import logging
import logging.handlers
import os
import stat
from collections.abc import Callable
from pathlib import Path
from socket import MSG_DONTWAIT
from socket import socket as Socket

from tmem.backends.paths import SegmentPaths
from tmem.errors import AttachError, TmemError
from tmem.fs import device, mounts
from tmem.fs.identity import has_common_names
from tmem.fs.options import MountOptions
from tmem.fs.plan import Plan, Successor
from tmem.fs.serving import Server

log = logging.getLogger(__name__)

SUCCESSOR = Successor()
"""The usual one."""


def run(
    lower: str,
    mountpoint: str,
    options: MountOptions,
    paths: SegmentPaths,
    ready: Callable[[], None] = lambda: None,
    *,
    detached: bool = False,
    successor: Successor = SUCCESSOR,
    locked: bool = True,
) -> None:
    """Mount `lower` on `mountpoint` and serve it until it is unmounted; `ready` is called once it answers.

    AttachError if it cannot be mounted. `detached`, `successor` and `locked`: see `Plan`.
    """
    lower, mountpoint = check_places(lower, mountpoint)
    mounts.sweep(mountpoint)
    if (top := mounts.top_mount(mountpoint)) is not None and top.kind == mounts.KIND:
        raise AttachError(
            f"{mountpoint} carries a tmem mount already: take it down with 'tmem umount {mountpoint}'"
        )
    try:
        root = os.open(lower, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AttachError(
            f"cannot open {lower}: {error.strerror}; name a directory that you may read, or run this as root"
        ) from None
    if options.tier is not None and not has_common_names(root):
        os.close(root)
        raise AttachError(
            f"{lower} is on a FUSE file system, which numbers its files on each host anew, so hosts cannot "
            "tell each other which file is which: mount it without tier="
        )
    plan = Plan(lower, mountpoint, options, paths, detached, successor, locked)
    Server(plan, root).run(lambda: device.mount(lower, mountpoint, options), ready=ready)


def daemonise(
    lower: str,
    mountpoint: str,
    options: MountOptions,
    paths: SegmentPaths,
    successor: Successor = SUCCESSOR,
    *,
    locked: bool = True,
) -> int:
    """Mount in a process of its own and return its pid once the mount answers. AttachError if it does not.

    It is forked, so with `locked` all that the caller has in memory is copied: a large caller may do without.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run_daemon(lower, mountpoint, options, paths, successor, locked, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = os.fsdecode(pipe.read())
    if message != _READY:
        os.waitpid(pid, 0)
        raise AttachError(
            message
            or f"the daemon of {mountpoint} ended before it had mounted it: add --foreground to see why, or "
            "look at the system's log"
        )
    try:
        os.stat(mountpoint)  # noqa: PTH116 - comes back when the mount answers
    except OSError as error:
        raise AttachError(
            f"the mount on {mountpoint} does not answer: {error.strerror}; look at the system's log, then "
            "'tmem umount' it and mount again"
        ) from None
    return pid


_READY = "ready"


def _run_daemon(
    lower: str,
    mountpoint: str,
    options: MountOptions,
    paths: SegmentPaths,
    successor: Successor,
    locked: bool,
    writing: int,
) -> None:
    """Be the daemon; never returns."""
    status = 1
    told = False

    def tell(message: str) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writing, os.fsencode(message))  # paths need not be UTF-8
            os.close(writing)

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)
        tell(_READY)

    try:
        os.setsid()
        lower, mountpoint = os.path.abspath(lower), os.path.abspath(mountpoint)  # noqa: PTH100
        os.chdir("/")
        log_to_syslog()
        run(lower, mountpoint, options, paths, ready, detached=True, successor=successor, locked=locked)
        status = 0
    except TmemError as error:
        log.error("%s", error)
        tell(str(error))
    except BaseException as error:
        log.exception("the mount of %s failed", lower)
        tell(f"cannot mount {lower} on {mountpoint}: {type(error).__name__}: {error}")
    finally:
        os._exit(status)  # not the caller's exit handlers


def check_places(lower: str, mountpoint: str) -> tuple[str, str]:
    """Return both directories absolute and resolved. AttachError if they cannot be used together."""
    try:
        lower = str(Path(lower).resolve(strict=True))
    except OSError as error:
        raise AttachError(
            f"cannot use {lower}: {error.strerror}; name the directory whose files are to be cached"
        ) from None
    mountpoint = mounts.resolve(mountpoint)
    if not Path(lower).is_dir():
        raise AttachError(f"{lower} is not a directory: name the directory whose files are to be cached")
    if mountpoint != lower and Path(lower) in Path(mountpoint).parents:
        # A lookup of the mount point in the lower directory would ask the daemon that is doing the lookup.
        raise AttachError(
            f"{mountpoint} is inside {lower}: choose a mount point outside it, or {lower} itself"
        )
    mounts.sweep(mountpoint)
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):  # noqa: PTH116
            raise AttachError(f"{mountpoint} is not a directory: make one to mount on")
    except OSError as error:
        raise AttachError(f"cannot use {mountpoint}: {error.strerror}; make the directory first") from None
    return lower, mountpoint


class Unhurried(logging.handlers.SysLogHandler):
    """Loses a message rather than wait for the system's log, which may be waiting for this mount."""

    socket: Socket

    def emit(self, record: logging.LogRecord) -> None:
        """Send it if that can be done at once."""
        priority = self.encodePriority(self.facility, self.mapPriority(record.levelname))
        message = f"<{priority}>{self.format(record)}\0".encode(errors="surrogateescape")
        for _ in range(2):  # once more if the log was started anew
            try:
                self.socket.send(message, MSG_DONTWAIT)
                return
            except BlockingIOError:
                return
            except OSError:
                self.socket.close()
                self.createSocket()


def log_to_syslog(path: str = "/dev/log") -> None:
    """Log to the system's log if there is one: a daemon has no terminal."""
    handler: logging.Handler = logging.NullHandler()  # or the caller would read everything twice
    if Path(path).exists():
        with contextlib.suppress(OSError):
            handler = Unhurried(path)
            handler.setFormatter(logging.Formatter("tmem-mount[%(process)d]: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("tmem").setLevel(logging.INFO)
