"""What `doctor` says of tiers: where spill files lie, whether servers can be trusted with pages, what the
manager has to say of them.

Yields states and words; `doctor` makes findings of them. Nothing is changed by looking: a server is asked
what it is, for `TIMEOUT_SECONDS` at most. Threading: plain functions.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import procfiles, service, tiering
from tmem.backends.paths import SegmentPaths
from tmem.errors import ServiceError, TmemError

if TYPE_CHECKING:
    from tmem.backends import _native

TIMEOUT_SECONDS = 3.0
_IN_MEMORY = ("tmpfs", "ramfs")


def examine(
    paths: SegmentPaths, opened: "_native.Segment", mounts: Path = Path("/proc/self/mountinfo")
) -> Iterator[tuple[str, bool, str, str]]:
    """Yield the name of each client that has a tier, whether all is well, what was found, what mends it."""
    problems = _problems(paths)
    for client in sorted(opened.clients(), key=lambda one: one.name):
        try:
            name, url = client.name, tiering.of(paths, client)
            if url is None:
                continue
            where = tiering.shown(url)
            file = tiering.spill_path(url)
            trouble = _of_file(file, mounts) if file is not None else _of_servers(url)
        except TmemError as error:
            yield name, False, str(error), f"tmem --name {paths.name} list {name}"
            continue
        if trouble is None and problems.get(name):
            trouble = problems[name], f"tmem --name {paths.name} list {name}"
        if trouble is None:
            yield name, True, where, ""
        else:
            yield name, False, f"{where}: {trouble[0]}", _named(trouble[1], paths.name, name)


def _named(remedy: str, segment: str, client: str) -> str:
    return remedy.replace("{segment}", segment).replace("{client}", client)


def _problems(paths: SegmentPaths) -> dict[str, str]:
    """Return why pages of clients stay in memory, as the manager says; empty without one."""
    try:
        problems = service.request(paths, {"op": "ping"}, timeout_s=5).get("tier_problems")
    except ServiceError:
        return {}
    return problems if isinstance(problems, dict) else {}


def _of_file(file: Path, mounts: Path) -> tuple[str, str] | None:
    """Return what is wrong with a spill file, and what mends it."""
    again = (
        "tmem --name {segment} set {client} --tier none, then "
        "tmem --name {segment} set {client} --tier /DISK/{client}.spill --tier-size SIZE"
    )
    try:
        status = file.stat()
    except OSError as error:
        return f"the file cannot be reached ({error.strerror})", "mount its file system, or bring it back"
    kind, source = file_system(file, mounts)
    if kind in _IN_MEMORY:
        return f"lies on {kind}, which is memory (and may be swapped out): nothing is gained", again
    if source.startswith("/dev/zram"):
        return f"lies on {source}, which is memory: nothing is gained", again
    if status.st_blocks * 512 < status.st_size * 0.9:
        return "has holes, so a full disk can refuse pages later", again
    return None


def file_system(file: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """Return type and source of the file system that `file` lies on; empty where that cannot be told."""
    device = file.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in procfiles.lines(mounts):
        before, _, after = line.partition(" - ")
        if before.split(" ")[2] == wanted:
            kind, source, *_ = after.split(" ")
            return kind, source
    return "", ""


def _of_servers(url: str) -> tuple[str, str] | None:
    """Return what is wrong with the servers at `url`: not there, evicting, without replicas."""
    from tmem.backends.tiers.redis_fitness import Fitness
    from tmem.backends.tiers.redis_nodes import Nodes
    from tmem.backends.tiers.redis_url import RedisAddress

    address = RedisAddress.parse(url)
    nodes = Nodes(replace(address, timeout_seconds=min(address.timeout_seconds, TIMEOUT_SECONDS)))
    try:
        Fitness(nodes).look()
    except TmemError as error:
        what, _, remedy = str(error).partition(": ")
        return what, remedy or "start the servers, or 'tmem --name {segment} set {client} --tier none'"
    finally:
        nodes.close()
    return None
