"""NBD over a unix socket: our server beside nbdkit's memory plugin, in C, sparse and with zstd.

fio's nbd engine, one connection, random requests of 4 KiB over the queue depth and sequential ones of
128 KiB. Needs no root. `servers` is for the scripts as well.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.bench import fio
from tmem.bench.grounds import running, wait_for_socket, workplace
from tmem.bench.parts import Effort, Part, Plan, Step
from tmem.bench.results import OURS, Lacking, Outcome, Sample, Series, comparisons
from tmem.bench.rounds import FAILURES, named, reason, take_turns
from tmem.errors import TmemError
from tmem.nbd import server
from tmem.nbd.export import Export

MEMORY, ZSTD = "nbdkit memory", "nbdkit memory zstd"
PEERS = {MEMORY: ("memory",), ZSTD: ("memory", "allocator=zstd")}
"""nbdkit's plugin and what follows the size on its command line."""

INSTALL = "apt-get install nbdkit nbdkit-plugin-python"

_DEPTHS, _QUICK_DEPTHS = (1, 4, 16, 32), (1, 32)
_KINDS = {"randread": "4 KiB random reads", "randwrite": "4 KiB random writes"}
_START_S = 0.4
"""What fio takes besides."""

AHEAD = 1.0


def size_bytes(effort: Effort) -> int:
    """Return the size of each device."""
    return (64 if effort.quick else 256) << 20


def cases(effort: Effort) -> list[tuple[Series, list[str]]]:
    """Return each case as a series without rounds and peer, and fio's arguments for it."""
    found = []
    for rw, chart in _KINDS.items():
        for depth in _QUICK_DEPTHS if effort.quick else _DEPTHS:
            case = Series(f"{chart}, depth {depth}", "", "IOPS", (), chart, depth)
            found.append((case, [f"--rw={rw}", "--bs=4k", f"--iodepth={depth}"]))
    for rw in ("write", "read"):
        case = Series(f"128 KiB {rw}s, depth 8", "", "MB/s", ())
        found.append((case, [f"--rw={rw}", "--bs=128k", "--iodepth=8"]))
    return found


def targets(case: Series) -> dict[str, float]:
    """Return what the project wants to reach: against memory that is not compressed, and against zstd."""
    if case.chart:
        return {MEMORY: AHEAD, ZSTD: AHEAD} if case.x in _QUICK_DEPTHS else {ZSTD: AHEAD}
    return {MEMORY: 0.6, ZSTD: AHEAD}


@contextmanager
def servers(
    directory: Path,
    size: int,
    lacking: list[Lacking],
    threads: int = server.THREADS,
    model: str = server.MODEL,
) -> Iterator[tuple[dict[str, str], _native.Pool]]:
    """Run ours and the peers; yield name -> NBD URI, and our pool. Peers that do not start are `lacking`."""
    paths = SegmentPaths("bench", directory)
    paths.state.mkdir(mode=0o700)
    with ExitStack() as stack:
        segment = _native.create(str(paths.segment), 2 * size)
        stack.callback(segment.close)
        segment.populate(2 * size)  # as the manager keeps a reserve
        pool = segment.client("bench").new_pool(persistent=True)
        export = Export("bench", size, unix=str(directory / "tmem.sock"))
        argv = server.arguments(paths, export, threads, model)
        log = directory / "tmem.log"
        process = stack.enter_context(running(argv, server.environment(os.environ), output=log))
        wait_for_socket(Path(str(export.unix)), process, "the server of tmem")
        uris = {OURS: _uri(Path(str(export.unix)))}
        for number, name in enumerate(PEERS):
            socket = directory / f"peer{number}.sock"
            try:
                process = stack.enter_context(running(peer_arguments(name, socket, size)))
                wait_for_socket(socket, process, name)
            except FAILURES as error:
                lacking.append(Lacking(name, reason(error)))
            else:
                uris[name] = _uri(socket)
        yield uris, pool


def peer_arguments(name: str, socket: Path, size: int) -> list[str]:
    """Return the command line of the peer `name`, in the foreground."""
    plugin, *options = PEERS[name]
    return ["nbdkit", "-f", "-U", str(socket), plugin, str(size), *options]


def plan(effort: Effort) -> Plan:
    """Say what is needed."""
    effort = _chosen(effort)
    rounds, seconds = effort.amount
    size = size_bytes(effort)
    steps = rounds * len(cases(effort)) * (1 + len(PEERS))
    return Plan(
        memory_bytes=4 * size,
        disk_bytes=0,
        steps=steps,
        about_s=steps * (seconds + _START_S) + 5,
        says=f"three NBD servers of {size >> 20} MiB on unix sockets, fio",
        refused=_refused(),
    )


def _refused() -> str | None:
    if shutil.which("nbdkit") is None:
        return f"nbdkit is not installed: {INSTALL}"
    try:
        server.check_python()
    except TmemError as error:
        return str(error)
    return fio.lacks("nbd")


def run(effort: Effort, step: Step) -> Outcome:
    """Measure every case."""
    effort = _chosen(effort)
    rounds, seconds = effort.amount
    size, outcome = size_bytes(effort), Outcome()
    with workplace() as directory, servers(directory, size, outcome.lacking) as (uris, pool):
        for uri in uris.values():
            fio.run([*_device(uri, size), "--rw=write", "--bs=128k", "--iodepth=8"])
        for case, arguments in cases(effort):
            ways = {
                name: _measure(uri, size, arguments, seconds, not case.chart) for name, uri in uris.items()
            }
            taken = take_turns(ways, rounds, named(step, case.case), outcome.lacking)
            uris = {name: uri for name, uri in uris.items() if name in taken}
            of_case = [
                Series(case.case, name, case.unit, tuple(samples), case.chart, case.x)
                for name, samples in taken.items()
            ]
            outcome.series += of_case
            outcome.rows += comparisons(of_case, targets=targets(case))
        held = pool.statistics()
        outcome.notes["pages_to_memory"] = held["pages"] * 4096 / max(1, held["bytes"])
        outcome.notes["device_bytes"] = size
    return outcome


def _chosen(effort: Effort) -> Effort:
    return effort.of(rounds=(5, 3), seconds=(1.0, 0.5))


def _uri(socket: Path) -> str:
    return f"nbd+unix:///?socket={socket}"


def _device(uri: str, size: int) -> list[str]:
    return ["--ioengine=nbd", f"--uri={uri}", f"--size={size}", *fio.DATA]


def _measure(
    uri: str, size: int, arguments: list[str], seconds: float, bandwidth: bool
) -> Callable[[], Sample]:
    argv = [*_device(uri, size), *fio.timed(seconds), *arguments]
    return lambda: fio.sample(fio.run(argv), bandwidth)


PART = Part("nbd", "NBD over a unix socket", plan, run)
