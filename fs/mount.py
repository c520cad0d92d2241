"""The life of a mount: in the foreground, or as a daemon that is there when the caller goes on.

The daemon is forked before trio starts; a pipe tells the caller that the mount answers, or why not. SIGTERM
and SIGINT unmount (lazily if files are open) and end it. Whatever happens, the mount point is left unmounted
and the pool destroyed; after SIGKILL the next mount at the same place cleans up. Not for unmounting from
outside: `mounts`.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pyfuse3
import trio

from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import start_ticks
from tmem.errors import AttachError, TmemError
from tmem.fs import device, mounts
from tmem.fs.device import Device
from tmem.fs.loop import Readers
from tmem.fs.options import Cache, Loop, MountOptions
from tmem.fs.overlay import Overlay, build
from tmem.fs.precache import Precache

log = logging.getLogger(__name__)


def run(
    lower: str,
    mountpoint: str,
    options: MountOptions,
    paths: SegmentPaths,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Mount `lower` on `mountpoint` and serve it until it is unmounted; `ready` is called once it answers.

    AttachError if it cannot be mounted.
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
        raise AttachError(f"cannot open {lower}: {error.strerror}") from None
    precache = Precache(paths, options.client, options.shared)
    readers = Readers()
    cache = _CacheRule(options.cache)
    overlay = build(
        root,
        precache,
        timeout_seconds=options.timeout_seconds,
        cached=cache,
        waiting=readers.waiting,
    )
    old_umask = os.umask(0)  # the kernel has applied the caller's
    try:
        precache.claim()
        with _record(paths, options.client, lower, mountpoint):
            _serve(lower, mountpoint, options, overlay, readers, cache, ready)
    finally:
        os.umask(old_umask)
        overlay.close()


def daemonise(lower: str, mountpoint: str, options: MountOptions, paths: SegmentPaths) -> int:
    """Mount in a process of its own and return its pid once the mount answers. AttachError if it does not."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run_daemon(lower, mountpoint, options, paths, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        message = pipe.read()
    if message != _READY:
        os.waitpid(pid, 0)
        raise AttachError(message or f"the daemon of {mountpoint} ended before it had mounted it")
    try:
        os.stat(mountpoint)  # noqa: PTH116 - comes back when the mount answers
    except OSError as error:
        raise AttachError(f"the mount on {mountpoint} does not answer: {error.strerror}") from None
    return pid


_READY = "ready"


def _run_daemon(
    lower: str, mountpoint: str, options: MountOptions, paths: SegmentPaths, writing: int
) -> None:
    """Be the daemon; never returns."""
    status = 1
    told = False

    def tell(message: str) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writing, message.encode())
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
        _log_to_syslog()
        run(lower, mountpoint, options, paths, ready)
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
        raise AttachError(f"cannot use {lower}: {error.strerror}") from None
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


class _CacheRule:
    """Which files the kernel caches itself; settled once the kernel's abilities are known.

    direct_io is the default wherever such files can be mapped shared (kernel 6.6+): pages are then kept once,
    in the pool. On older kernels mmap would fail with ENODEV on direct_io files, so there the kernel caches
    unless told otherwise. Reads of 1 MiB, sequential, client and daemon on one CPU, kernel 6.18, relative to
    bindfs in the same run: direct 1.1 to 1.4 from the pool; kernel 0.6 from the pool and 4 from its own copy.
    Opening and reading small files: direct 0.4, kernel 0.55. So cache=kernel suits small hot sets and spare
    RAM.
    """

    def __init__(self, wanted: Cache) -> None:
        self._wanted = wanted
        self._cached = wanted is not Cache.DIRECT

    def settle(self, direct_mmap: bool) -> None:
        self._cached = self._wanted is Cache.KERNEL or (self._wanted is Cache.AUTO and not direct_mmap)

    def __call__(self, status: os.stat_result) -> bool:
        return self._cached


def _serve(
    lower: str,
    mountpoint: str,
    options: MountOptions,
    overlay: Overlay,
    readers: Readers,
    cache: _CacheRule,
    ready: Callable[[], None],
) -> None:
    mounted = device.mount(lower, mountpoint, options)
    try:
        fast = options.loop is not Loop.PLAIN and readers.install()
        pyfuse3.init(overlay, f"/dev/fd/{mounted.session}", set())
        try:
            trio.run(_main, mounted, mountpoint, readers, fast, cache, ready)
        finally:
            pyfuse3.close(unmount=False)
            mounted.session = -1  # closed by libfuse
    finally:
        # Closing the device ends the connection; what is then still mounted there can only be a dead mount.
        mounted.close()
        mounts.sweep(mountpoint)


async def _main(
    mounted: Device,
    mountpoint: str,
    readers: Readers,
    fast: bool,
    cache: _CacheRule,
    ready: Callable[[], None],
) -> None:
    await device.negotiate(mounted)
    cache.settle(mounted.direct_mmap)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, signals, mountpoint)
            ready()
            await readers.serve(fast, mounted.session)
            nursery.cancel_scope.cancel()


async def _end_on_signal(signals: AsyncIterator[int], mountpoint: str) -> None:
    async for number in signals:
        log.info("signal %d: unmounting %s", number, mountpoint)
        try:
            await trio.to_thread.run_sync(mounts.detach, mountpoint)
        except TmemError as error:
            log.warning("%s", error)
        pyfuse3.terminate()
        return


@contextlib.contextmanager
def _record(paths: SegmentPaths, client: str, lower: str, mountpoint: str) -> Iterator[None]:
    """Keep a record of the mount beside the segment, if there is one, for commands that list mounts."""
    path = paths.record("mount", client)
    record = {
        "client": client,
        "lower": lower,
        "mountpoint": mountpoint,
        "pid": os.getpid(),
        "start_ticks": start_ticks(os.getpid()),
    }
    written = False
    if paths.state.is_dir():
        partial = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(record) + "\n")
            partial.replace(path)  # readers never see half a record
            written = True
    try:
        yield
    finally:
        if written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _log_to_syslog() -> None:
    handler: logging.Handler = logging.NullHandler()  # or the caller would read everything twice
    if Path("/dev/log").exists():
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler("/dev/log")
            handler.setFormatter(logging.Formatter("tmem-mount[%(process)d]: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("tmem").setLevel(logging.INFO)
