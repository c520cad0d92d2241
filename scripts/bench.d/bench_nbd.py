"""NBD over a unix socket, fio's nbd engine: our server beside nbdkit's C memory plugin (sparse and zstd)."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import fio, medians, paired_ratio, running, take_turns, wait_until, workplace

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.nbd import server
from tmem.nbd.export import Export

SIZE = 256 << 20
# LZ4 makes about 2.5 : 1 of it; fresh bytes for every write
DATA = ["--buffer_compress_percentage=63", "--buffer_compress_chunk=4096", "--refill_buffers"]
CASES = {
    "randread 4k qd1": ["--rw=randread", "--bs=4k", "--iodepth=1"],
    "randwrite 4k qd1": ["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    "randread 4k qd32": ["--rw=randread", "--bs=4k", "--iodepth=32"],
    "randwrite 4k qd32": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    "write 128k qd8": ["--rw=write", "--bs=128k", "--iodepth=8"],
    "read 128k qd8": ["--rw=read", "--bs=128k", "--iodepth=8"],
}
TARGETS = {
    ("randread 4k qd1", "memory"): 0.9,
    ("randwrite 4k qd1", "memory"): 0.9,
    ("randread 4k qd32", "memory"): 0.9,
    ("randwrite 4k qd32", "memory"): 0.9,
    ("write 128k qd8", "memory-zstd"): 2.3,
}


@contextmanager
def servers(directory: Path, threads: int | None = None) -> Iterator[dict[str, str]]:
    """Run the three servers; yield name -> NBD URI."""
    paths = SegmentPaths("bench", directory)
    paths.state.mkdir(mode=0o700)
    segment = _native.create(str(paths.segment), 2 * SIZE)
    segment.populate(2 * SIZE)  # as the manager keeps a reserve
    pool = segment.client("bench").new_pool(persistent=True)
    export = Export("bench", SIZE, unix=str(directory / "tmem.sock"))
    sockets = {name: directory / f"{name}.sock" for name in ("tmem", "memory", "memory-zstd")}
    argv = {
        "tmem": server.arguments(paths, export, **({} if threads is None else {"threads": threads})),
        "memory": ["nbdkit", "-f", "-U", str(sockets["memory"]), "memory", str(SIZE)],
        "memory-zstd": [
            "nbdkit",
            "-f",
            "-U",
            str(sockets["memory-zstd"]),
            "memory",
            str(SIZE),
            "allocator=zstd",
        ],
    }
    with ExitStack() as stack:
        for name, command in argv.items():
            env = server.environment(os.environ) if name == "tmem" else None
            stack.enter_context(running(command, env))
        for path in sockets.values():
            wait_until(path.exists, f"the server at {path}")
        yield {name: f"nbd+unix:///?socket={path}" for name, path in sockets.items()}
        held = pool.statistics()
        print(f"  tmem holds {held['pages']} pages at {held['pages'] * 4096 / max(1, held['bytes']):.2f} : 1")
    segment.close()


def _case(uri: str, arguments: list[str], seconds: float) -> Callable[[], float]:
    kind = "read" if "read" in arguments[0] else "write"

    def measure() -> float:
        job = fio(
            [
                "--ioengine=nbd",
                f"--uri={uri}",
                f"--size={SIZE}",
                f"--runtime={seconds}",
                "--time_based",
                *DATA,
                *arguments,
            ]
        )
        side = job[kind]
        assert isinstance(side, dict)
        return float(side["iops"])

    return measure


def run(rounds: int, seconds: float, threads: int | None = None) -> dict[str, object]:
    """Measure every case; IOPS by peer, and the ratios."""
    results: dict[str, object] = {}
    with workplace() as directory, servers(directory, threads) as uris:
        for uri in uris.values():
            fio(
                [
                    "--ioengine=nbd",
                    f"--uri={uri}",
                    f"--size={SIZE}",
                    "--rw=write",
                    "--bs=128k",
                    "--iodepth=8",
                    *DATA,
                ]
            )
        for case, arguments in CASES.items():
            taken = take_turns({name: _case(uri, arguments, seconds) for name, uri in uris.items()}, rounds)
            ratios = {peer: paired_ratio(taken["tmem"], taken[peer]) for peer in ("memory", "memory-zstd")}
            results[case] = {"iops": medians(taken), "rounds": taken, "ratios": ratios}
            shown = "  ".join(f"{ratio:5.2f} of {peer}" for peer, ratio in ratios.items())
            verdicts = [
                f"target {target} {'reached' if ratios[peer] >= target else 'MISSED'}"
                for (of, peer), target in TARGETS.items()
                if of == case
            ]
            print(
                f"  {case:18} {medians(taken)['tmem']:9.0f} IOPS  {shown}  {' '.join(verdicts)}", flush=True
            )
    return results
