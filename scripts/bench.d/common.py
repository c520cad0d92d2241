"""What the benchmarks share: places, processes that are always taken down, rounds that alternate, ratios.

Every figure is the median of rounds in which the peers take turns, because the machines are shared; what is
printed are ratios within such a run.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, object]:
    """Return the line that says where figures come from."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "load_1min": os.getloadavg()[0],
    }


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield a private directory on tmpfs, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="tmem-bench.", dir="/dev/shm") as name:
        yield Path(name)


@contextmanager
def running(
    argv: Sequence[str], env: Mapping[str, str] | None = None, cpus: Iterable[int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, pinned to `cpus` if given, while the block lasts; it is ended, and killed if need be."""
    prefix = [] if cpus is None else ["taskset", "-c", ",".join(map(str, cpus))]
    process = subprocess.Popen([*prefix, *argv], env=None if env is None else dict(env))
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=30)
            raise


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll `condition` until it holds; RuntimeError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come about within {timeout_s:.0f} s")
        time.sleep(0.02)


def fio(arguments: Sequence[str], cpu: int | None = None) -> dict[str, object]:
    """Run fio and return its first job's results."""
    prefix = [] if cpu is None else ["taskset", "-c", str(cpu)]
    done = subprocess.run(
        [*prefix, "fio", "--name=job", "--output-format=json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fio failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    # fio may print notes before the document
    document = json.loads(done.stdout[done.stdout.index("{") :])
    result: dict[str, object] = document["jobs"][0]
    return result


def medians(rounds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each peer's rounds."""
    return {name: statistics.median(values) for name, values in rounds.items()}


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Return the median of the ratios round by round: both halves of a pair saw the same minute."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield each name `rounds` times, in turn, with the order turned round every time."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def take_turns(peers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each peer `rounds` times, `in_turn`."""
    results: dict[str, list[float]] = {name: [] for name in peers}
    for name in in_turn(list(peers), rounds):
        results[name].append(peers[name]())
    return results


def judged(
    case: str, placement: str, ratio: float, peer: str, target: float | None = None
) -> dict[str, object]:
    """Print one line of a table and return it: how fast we were relative to `peer`, and what was wanted."""
    row: dict[str, object] = {"case": case, "placement": placement, "peer": peer, "ratio": ratio}
    verdict = ""
    if target is not None:
        row |= {"target": target, "reached": ratio >= target}
        verdict = f"target {target:.2g} {'reached' if ratio >= target else 'MISSED'}"
    print(f"  {case:38} {placement:9} {ratio:7.2f} of {peer:18} {verdict}".rstrip(), flush=True)
    return row


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """Make a memory control group (v1 or v2); yield its directory. Whoever is in it has ended before."""
    v1 = Path("/sys/fs/cgroup/memory")
    path = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"tmem-bench-{os.getpid()}"
    path.mkdir()
    try:
        limit = path / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
        limit.write_text(str(limit_bytes))
        yield path
    finally:

        def gone() -> bool:
            try:
                path.rmdir()
            except OSError:
                return False
            return True

        wait_until(gone, f"the end of {path}")
