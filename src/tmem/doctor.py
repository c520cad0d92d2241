"""Looks at the machine, the segment and the manager, and says what is missing and which command mends it.

Every check returns findings as data; `tmem.cli.doctor` prints them. Nothing is changed by looking. Not for
the guards of local swap: those come from `tmem.nbd.guards` and are only listed here. Threading: plain
functions.
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tmem.backends import cgroup, locking, procfiles, scraping, segment, service, tierchecks
from tmem.backends.paths import SegmentPaths
from tmem.config import reading
from tmem.config.place import DEFAULT_PATH
from tmem.errors import ConfigError, SegmentError, ServiceError, TmemError
from tmem.fs import asking
from tmem.fs.statistics import MountStatistics
from tmem.nbd import guards
from tmem.types import format_size

OK, NOTE, MISSING = "ok", "note", "missing"
"""States: all right; works, but not as well as it could; needed and not there."""

_CAP_IPC_LOCK, _CAP_SYS_RESOURCE = 14, 24


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    group: str
    """``program``, ``kernel``, ``privilege``, ``configuration``, ``segment``, ``tier``, ``guard`` (of devices
    that this machine swaps to), or without such a device ``local swap``: what it would need."""
    name: str
    """What was looked at."""
    state: str
    """`OK`, `NOTE` or `MISSING`."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it: a command where there is one."""


def examine(paths: SegmentPaths, config: Path | None = None) -> list[Finding]:
    """Return all findings, group by group. `config` is the configuration in place of the usual one."""
    return [
        *_programs(),
        *_kernel(paths),
        *_privileges(),
        *_configuration(config),
        *_segment(paths),
        *_guards(paths),
    ]


def _programs() -> Iterator[Finding]:
    yield _nbdkit()
    needed = [
        ("fusermount3", MISSING, "mounts without root", "fuse3"),
        ("mkswap", MISSING, "writes the header of a swap device", "util-linux"),
        ("swapon", MISSING, "puts a swap device in use", "mount"),
        ("losetup", MISSING if not _has_nbd_driver() else NOTE, "makes a block device of a file", "mount"),
        ("nbdfuse", MISSING if not _has_nbd_driver() else NOTE, "attaches without the nbd driver", _NBDFUSE),
        ("fio", NOTE, "benchmarks and quickstart", "fio"),
    ]
    for program, absent, purpose, package in needed:
        path = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        if path is None:
            yield Finding("program", program, absent, f"not found; {purpose}", f"apt-get install {package}")
        else:
            yield Finding("program", program, OK, path)


# Debian 12 has nbdfuse in libnbd-bin; later releases have it in a package of its own.
_NBDFUSE = "libnbd-bin || apt-get install nbdfuse"


def _nbdkit() -> Finding:
    install = "apt-get install nbdkit nbdkit-plugin-python"
    if shutil.which("nbdkit") is None:
        return Finding("program", "nbdkit", MISSING, "not found; serves swap devices", install)
    dump = _output("nbdkit", "python", "--dump-plugin")
    values = dict(line.split("=", 1) for line in dump.splitlines() if "=" in line)
    if "python_version" not in values:
        return Finding("program", "nbdkit", MISSING, "has no Python plugin", install)
    embedded = ".".join(values["python_version"].split(".")[:2])
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    detail = f"{values.get('version', '?')} with Python {embedded}"
    if embedded != ours:
        remedy = f"install tmem under python{embedded}: rm -r .venv && scripts/test"
        return Finding("program", "nbdkit", MISSING, f"{detail}, but tmem runs under {ours}", remedy)
    return Finding("program", "nbdkit", OK, detail)


def _kernel(paths: SegmentPaths) -> Iterator[Finding]:
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield Finding("kernel", "fuse", OK, "/dev/fuse")
    else:
        yield Finding(
            "kernel", "fuse", MISSING, "/dev/fuse cannot be opened; mounts need it", "modprobe fuse"
        )
    if _has_nbd_driver():
        yield Finding(
            "kernel", "nbd driver", OK, "attaches swap devices, and keeps requests while a server is away"
        )
    else:
        detail = (
            "none; swap devices attach through nbdfuse and a loop device, and do not outlive their server"
        )
        yield Finding("kernel", "nbd driver", NOTE, detail, "modprobe nbd, if this kernel has the module")
    if Path("/dev/loop-control").exists():
        yield Finding("kernel", "loop devices", OK, "/dev/loop-control")
    else:
        state = NOTE if _has_nbd_driver() else MISSING
        yield Finding("kernel", "loop devices", state, "none", "modprobe loop")
    yield _noswap(paths)
    version = cgroup.version()
    if version is None:
        detail = "no memory control group; local swap cannot be contained"
        yield Finding("kernel", "memory cgroup", NOTE, detail, "boot with cgroup_enable=memory")
    else:
        limit = cgroup.memory_limit()
        detail = "no limit here" if limit is None else f"{format_size(limit.limit_bytes)} here"
        yield Finding("kernel", "memory cgroup", OK, f"v{version}, {detail}")
    if Path("/proc/pressure/memory").exists():
        yield Finding("kernel", "PSI", OK, "/proc/pressure")
    else:
        yield Finding("kernel", "PSI", NOTE, "pressure is not measured", "boot with psi=1")


def _noswap(paths: SegmentPaths) -> Finding:
    directory = Path("/run/tmem")
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release >= (6, 4) and paths.directory != directory and locking.swappable(paths.segment):
        detail = f"{paths.directory} is a tmpfs that can be swapped out"
        remedy = f"for local swap leave out TMEM_RUNTIME_DIR, so that segments lie in {directory}"
        return Finding("kernel", "tmpfs noswap", NOTE, detail, remedy)
    mounted = segment.mount_options(directory)
    if mounted is not None and mounted[0] == "tmpfs":
        if "noswap" in mounted[1]:
            return Finding("kernel", "tmpfs noswap", OK, f"{directory} is never swapped out")
        detail = f"{directory} is a tmpfs that can be swapped out"
        return Finding("kernel", "tmpfs noswap", NOTE, detail, "use kernel 6.4 or newer for local swap")
    if release >= (6, 4):
        return Finding("kernel", "tmpfs noswap", OK, "this kernel has it")
    return Finding(
        "kernel", "tmpfs noswap", NOTE, "this kernel lacks it", "use kernel 6.4 or newer for local swap"
    )


def _privileges() -> Iterator[Finding]:
    capabilities = _effective_capabilities()
    if os.geteuid() == 0:
        yield Finding("privilege", "root", OK, "may mount, attach and swap")
    else:
        detail = f"user {os.geteuid()}: segments and mounts of your own, no swap"
        yield Finding("privilege", "root", NOTE, detail, "run as root for swap devices")
    if capabilities >> _CAP_SYS_RESOURCE & 1:
        yield Finding(
            "privilege", "CAP_SYS_RESOURCE", OK, "servers can be IO_FLUSHER and escape the OOM killer"
        )
    else:
        detail = "missing; servers cannot be IO_FLUSHER nor escape the OOM killer"
        yield Finding("privilege", "CAP_SYS_RESOURCE", NOTE, detail, "grant the capability to the container")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if capabilities >> _CAP_IPC_LOCK & 1 or locked == resource.RLIM_INFINITY:
        yield Finding("privilege", "locked memory", OK, "unlimited")
    else:
        detail = f"limited to {format_size(locked)}; servers cannot lock themselves"
        yield Finding("privilege", "locked memory", NOTE, detail, "ulimit -l unlimited")


def _configuration(chosen: Path | None) -> Iterator[Finding]:
    try:
        found = reading.load(chosen)
    except ConfigError as error:
        place = str(error).partition(": ")[0]
        remedy = f"edit {place.partition(':')[0]}; 'tmem start', 'swap add' and 'mount' refuse it until then"
        yield Finding("configuration", "files", MISSING, str(error), remedy)
        return
    read = ", ".join(map(str, found.sources))
    yield Finding("configuration", "files", OK, read or f"no {DEFAULT_PATH}: defaults everywhere")


def _segment(paths: SegmentPaths) -> Iterator[Finding]:
    start = f"tmem --name {paths.name} start -d"
    try:
        segment.core()
    except SegmentError as error:
        yield Finding("segment", "native core", MISSING, str(error), "pip install -e .")
        return
    try:
        opened = segment.attach(paths.name)
    except SegmentError as error:
        if paths.segment.exists():
            remedy = f"tmem --name {paths.name} destroy --all"
            yield Finding("segment", paths.name, MISSING, str(error), remedy)
        else:
            yield Finding("segment", paths.name, NOTE, "not created yet", start)
        return
    with closing(opened):
        services = _services(paths)
        if services is None:
            detail = "none runs: servers that die stay dead, and nobody refills the reserve"
            yield Finding("segment", "manager", NOTE, detail, start)
        else:
            running = ", ".join(f"{one['name']} ({one['state']})" for one in services) or "nothing"
            yield Finding("segment", "manager", OK, f"runs and supervises {running}")
            yield from _metrics(paths)
        for one in tierchecks.examine(paths, opened, guards.swapped_to(paths)):
            state = MISSING if not one.well else NOTE if one.remedy else OK
            yield Finding("tier", one.client, state, one.detail, one.remedy)
        yield from _mounts(paths)
        violations = opened.check()
        if not violations:
            detail = f"{format_size(opened.memory_bytes)}, every invariant holds"
            yield Finding("segment", paths.name, OK, detail)
        # While servers work on it the check sees things half done.
        state, suffix = (NOTE, " (while in use)") if services or opened.clients() else (MISSING, "")
        for violation in violations:
            remedy = "report it" if state is MISSING else "stop all servers and mounts, then look again"
            yield Finding("segment", paths.name, state, violation + suffix, remedy)


def _mounts(paths: SegmentPaths) -> Iterator[Finding]:
    """Yield what mounts say of the servers that they share with other hosts."""
    found = [one for one in asking.recorded(paths) if one.tier is not None]
    answers = asking.Asker().ask([one.mountpoint for one in found]) if found else {}
    for one in found:
        state, detail, remedy = tier_of_mount(answers[one.mountpoint])
        yield Finding("tier", one.mountpoint, state, f"{one.tier}: {detail}", remedy)


def tier_of_mount(counted: MountStatistics | None) -> tuple[str, str, str]:
    """Return state, detail and remedy for the tier of a mount that has counted this; None: it is silent."""
    if counted is None:
        return NOTE, "the mount does not answer", "look whether its lower directory does"
    if not counted.tier_up:
        return (
            MISSING,
            "does not answer, or not to this mount, which reads its lower directory alone until it does",
            "start the servers, and look at the mount's log ('journalctl -t tmem-mount') for what they say",
        )
    if counted.tier_dropped_pages > counted.tier_sent_pages:
        return (
            NOTE,
            f"took {counted.tier_sent_pages} pages, and {counted.tier_dropped_pages} not: it is full and "
            "does not evict, or is too slow",
            "CONFIG SET maxmemory-policy allkeys-lru",
        )
    return (
        OK,
        f"asked; {counted.tier_hit_pages} pages came from there, {counted.tier_sent_pages} went there",
        "",
    )


def _metrics(paths: SegmentPaths) -> Iterator[Finding]:
    """Yield whether metrics are served, if somebody has asked for it."""
    address = scraping.address_of(paths)
    if address is None:
        return
    if scraping.answers(paths, address):
        yield Finding("segment", "metrics", OK, f"served on {address}")
    else:
        remedy = "choose another address for --metrics or in [start], then 'tmem restart --manager'"
        detail = scraping.last_words(paths) or f"nobody serves them on {address}"
        yield Finding("segment", "metrics", MISSING, detail, remedy)


def _services(paths: SegmentPaths) -> list[dict[str, object]] | None:
    """Return what the manager says of each service, or None if it does not answer."""
    try:
        services = service.request(paths, {"op": "services"}, timeout_s=5)["services"]
    except ServiceError:
        return None
    assert isinstance(services, list)
    return services


def _guards(paths: SegmentPaths) -> Iterator[Finding]:
    """Yield the guards of every device that this machine itself swaps to, or what it would need to do so.

    Devices that others swap to need none.
    """
    try:
        found = guards.report(paths)
    except TmemError as error:
        yield Finding("guard", "records", MISSING, str(error), f"look into {paths.state}")
        return
    group = "guard"
    if not found:
        group, found = "local swap", guards.prospect(paths)
    for guard in found:
        state = OK if guard.state is guards.State.ON else NOTE
        yield Finding(group, guard.name, state, f"{guard.state}: {guard.why}", guard.remedy)


def _has_nbd_driver() -> bool:
    return Path("/sys/module/nbd").exists() or Path("/dev/nbd0").exists()


def _effective_capabilities() -> int:
    for line in procfiles.lines(Path("/proc/self/status")):
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _output(*argv: str) -> str:
    """Return what a program prints, an empty string if it fails."""
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
