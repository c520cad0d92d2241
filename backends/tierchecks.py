"""What `doctor` says of tiers: where spill files lie, whether servers can be trusted with pages, what the
manager has to say of them.

Yields states and words; `doctor` makes findings of them. Nothing is changed by looking: a server is asked
what it is, for `TIMEOUT_SECONDS` at most. What the kernel says of disks: `filesystems`. Threading: plain
functions.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import filesystems, service, tiering
from tmem.backends.filesystems import Place
from tmem.backends.paths import SegmentPaths
from tmem.errors import ServiceError, TmemError
from tmem.types import format_size

if TYPE_CHECKING:
    from tmem.backends import _native

TIMEOUT_SECONDS = 3.0
_IN_MEMORY = ("tmpfs", "ramfs")
_OVER_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "lustre", "virtiofs", "ocfs2", "gfs2")
_AGAIN = (
    "tmem --name {segment} set {client} --tier none, then "
    "tmem --name {segment} set {client} --tier /DISK/{client}.spill --tier-size SIZE"
)


@dataclass(frozen=True)
class Verdict:
    """What was found of one client's tier."""

    client: str
    """The client's name."""
    well: bool
    """It does what a tier is for."""
    detail: str
    """The tier, and what is wrong or should be known."""
    remedy: str = ""
    """What mends it; also where all is well, but not as well as it could be."""


@dataclass(frozen=True)
class _Trouble:
    """What is wrong with a tier, or should at least be known (`minor`)."""

    detail: str
    remedy: str
    minor: bool = False


def examine(
    paths: SegmentPaths, opened: "_native.Segment", local: Collection[str] = (), only: str | None = None
) -> Iterator[Verdict]:
    """Yield a verdict on each client that has a tier, or on the one called `only`. This machine swaps to the
    devices of the clients `local`."""
    problems = _problems(paths)
    for client in sorted(opened.clients(), key=lambda one: one.name):
        if only not in (None, client.name):
            continue
        try:
            name, url = client.name, tiering.of(paths, client)
            if url is None:
                continue
            where = tiering.shown(url)
            file = tiering.spill_path(url)
            found = of_file(file, name in local) if file is not None else _of_servers(url, name in local)
        except TmemError as error:
            yield Verdict(name, False, str(error), f"tmem --name {paths.name} list {name}")
            continue
        if (found is None or found.minor) and problems.get(name):
            found = _Trouble(problems[name], f"tmem --name {paths.name} list {name}")
        if found is None:
            yield Verdict(name, True, where)
        else:
            remedy = found.remedy.replace("{segment}", paths.name).replace("{client}", name)
            yield Verdict(name, found.minor, f"{where}: {found.detail}", remedy)


def _problems(paths: SegmentPaths) -> dict[str, str]:
    """Return why pages of clients stay in memory, as the manager says; empty without one."""
    try:
        problems = service.request(paths, {"op": "ping"}, timeout_s=5).get("tier_problems")
    except ServiceError:
        return {}
    return problems if isinstance(problems, dict) else {}


def of_file(file: Path, local: bool) -> _Trouble | None:
    """Return what is wrong with a spill file, the worst first, or what should be known of it."""
    try:
        status = file.stat()
        place = filesystems.place_of(file)
    except OSError as error:
        return _Trouble(
            f"the file cannot be reached ({error.strerror})", "mount its file system, or bring it back"
        )
    found = of_place(place, local, filesystems.swap_disks())
    if (found is None or found.minor) and status.st_blocks * 512 < status.st_size * 0.9:
        return _Trouble("has holes, so a full disk can refuse pages later", _AGAIN)
    return found


def of_place(place: Place, local: bool, swap_disks: dict[str, str]) -> _Trouble | None:
    """Return what speaks against a spill file at `place`, the worst first."""
    if place.kind in _IN_MEMORY:
        return _Trouble(
            f"lies on {place.kind}, which is memory (and may be swapped out): nothing is gained", _AGAIN
        )
    if zram := next((name for name in place.devices if name.startswith("zram")), None):
        return _Trouble(f"lies on /dev/{zram}, which is memory: nothing is gained", _AGAIN)
    beyond = _beyond_this_kernel(place)
    if local and beyond:
        return _Trouble(
            f"lies on {beyond}: to write there can need memory, and so wait for ever, where this machine "
            "swaps to the device",
            f"a disk of this machine: {_AGAIN}",
        )
    if place.direct is False:
        return _Trouble(
            f"lies on {place.kind} that takes direct I/O through the page cache (ext4 does with "
            "data=journal): that takes memory when it is short",
            _AGAIN,
        )
    if place.rewrites_in_place is False:
        return _Trouble(
            f"lies on {place.kind}, which writes elsewhere what is written again: on a full disk pages are "
            f"refused, though the file has all of its size ({format_size(place.free_bytes)} are free now)",
            f"keep room free there, or make it anew (on btrfs it is then made to stay where it is): {_AGAIN}",
            minor=True,
        )
    if beyond:
        detail = f"lies on {beyond}: who reads a page waits for that; not for a device of this machine"
        return _Trouble(detail, f"a disk of this machine: {_AGAIN}", minor=True)
    if disk := place.rotating:
        return _Trouble(
            f"lies on {disk}, which rotates, as far as the kernel knows: whoever reads a page waits for that",
            f"a disk that does not; where the kernel is wrong, as with virtual disks: "
            f"echo 0 > /sys/block/{disk}/queue/rotational",
            minor=True,
        )
    if shared := next((name for name in place.devices if name in swap_disks), None):
        return _Trouble(
            f"lies on {shared}, as the swap area {swap_disks[shared]}: both are busy when memory is short",
            f"another disk: {_AGAIN}",
            minor=True,
        )
    return None


def _beyond_this_kernel(place: Place) -> str:
    """Return what a file depends on beside this machine's kernel, nothing if there is no such thing."""
    if place.kind in _OVER_NETWORK:
        return f"{place.kind}, which is over a network or another machine's"
    if place.kind.startswith("fuse") and place.kind != "fuseblk":
        return f"{place.kind}, which a process serves"
    if nbd := next((name for name in place.devices if name.startswith(("nbd", "drbd", "rbd"))), None):
        return f"/dev/{nbd}, which is over a network"
    return ""


def _of_servers(url: str, local: bool) -> _Trouble | None:
    """Return what is wrong with the servers at `url`: not there, evicting, without replicas, for us."""
    from tmem.backends.tiers.redis_fitness import Fitness
    from tmem.backends.tiers.redis_nodes import Nodes
    from tmem.backends.tiers.redis_url import RedisAddress

    address = RedisAddress.parse(url)
    nodes = Nodes(replace(address, timeout_seconds=min(address.timeout_seconds, TIMEOUT_SECONDS)))
    try:
        Fitness(nodes).look()
    except TmemError as error:
        what, _, remedy = str(error).partition(": ")
        return _Trouble(
            what, remedy or "start the servers, or 'tmem --name {segment} set {client} --tier none'"
        )
    finally:
        nodes.close()
    if local:
        return _Trouble(
            "reading from servers takes memory, and this machine swaps to the device: it can wait for itself",
            f"a spill file on a disk of this machine: {_AGAIN}",
        )
    return None
