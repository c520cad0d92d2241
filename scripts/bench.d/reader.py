"""Who reads in the benchmarks of files: reader.c, whose own time hides nothing of the daemon's."""

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path


class Reader:
    """Compiles reader.c into `directory`, and runs it; see there for what it does."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "reader"
        source = Path(__file__).with_name("reader.c")
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-pthread", "-o", str(self._program), str(source), "-lm"], check=True
        )

    def __call__(
        self,
        files: Sequence[Path],
        pattern: str,
        block: int,
        *,
        threads: int = 1,
        count: int = 0,
        warm: int = 0,
        skip: int = 0,
        seed: int = 1,
        direct: bool = False,
        cpus: Iterable[int] | None = None,
        group: Path | None = None,
    ) -> dict[str, float]:
        """Read; requests, bytes, seconds, mean_us, p50_us, p99_us. In the control group `group` if given."""
        numbers = {"-b": block, "-t": threads, "-n": count, "-w": warm, "-k": skip, "-s": seed}
        argv = [str(self._program), "-p", pattern, *(f"{key}{value}" for key, value in numbers.items())]
        if direct:
            argv.append("-d")
        if group is not None:  # whoever execs takes its group along
            argv = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs"), *argv]
        if cpus is not None:
            argv = ["taskset", "-c", ",".join(map(str, cpus)), *argv]
        done = subprocess.run(
            argv, input="".join(f"{path}\n" for path in files), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the reader failed: {done.stderr.strip() or done.returncode}")
        figures: dict[str, float] = json.loads(done.stdout)
        return figures


def rate(figures: dict[str, float]) -> float:
    """Return the requests a second of a reader's run."""
    return figures["requests"] / figures["seconds"]
