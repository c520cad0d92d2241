"""How fast a program gets 90 % of all memory while a full ephemeral pool holds it, beside an empty one.

The machine is a memory control group (its limit is what the kernel enforces, and what the manager sees): the
manager, who filled the pool and the program that takes are in it. Full and empty in turn.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, paired_ratio, take_turns

from tmem.bench.grounds import memory_group, wait_until, workplace

TARGET = 1 / 1.1
"""Of the speed with an empty pool."""

MANAGER = """
import sys
from tmem.backends import manager, segment
from tmem.backends.paths import SegmentPaths
from tmem.types import SizeRange
made = segment.create("default", int(sys.argv[2]))
segment.resize(made, SizeRange(int(sys.argv[1]), int(sys.argv[2])))
manager.run(SegmentPaths.of("default"), made)
"""
# Pages that compress to about a half; puts until more is evicted than there is room for.
FILLER = """
import os, sys
from tmem.backends import segment
opened = segment.attach("default")
opened.set_limits(opened.memory_bytes, opened.memory_bytes)  # not by a 16th a second
pool = opened.client("cache").new_pool(persistent=False, exclusive=False)
noise, number = os.urandom(1 << 20), 0
while opened.statistics()["evicted_pages"] < 50000:
    pages = []
    for _ in range(256):
        at = number * 61 % ((1 << 20) - 2048)
        pages.append(number.to_bytes(8, "little") + noise[at : at + 2040] + bytes(2048))
        number += 1
    pool.put(bytes(24), number % (1 << 30), b"".join(pages))
print(pool.statistics()["pages"], opened.occupied[0], flush=True)
sys.stdin.read()
"""


def _in_group(group: Path, argv: list[str], env: dict[str, str], **pipes: int) -> subprocess.Popen[bytes]:
    """Start a program that is in the control group before it touches anything."""
    command = ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$0" "$@"', *argv]
    return subprocess.Popen(command, env=env, **pipes)


def _kills(group: Path) -> int:
    for name in ("memory.oom_control", "memory.events"):
        if (group / name).exists():
            found = re.search(r"^oom_kill (\d+)", (group / name).read_text(), re.M)
            return int(found[1]) if found else 0
    return 0


class _World:
    """A control group with a manager in it."""

    def __init__(self, directory: Path, group: Path, total_bytes: int, taker: Path) -> None:
        self.group, self._taker, self._total = group, taker, total_bytes
        self._env = os.environ | {"TMEM_RUNTIME_DIR": str(directory)}
        self._directory = directory
        self.rounds: list[dict[str, Any]] = []

    @contextmanager
    def _managed(self) -> Iterator[None]:
        least, most = self._total // 32, self._total * 15 // 16
        argv = [sys.executable, "-c", MANAGER, str(least), str(most)]
        manager = _in_group(self.group, argv, self._env)
        try:
            wait_until(lambda: self._ask("ping") is not None, "the manager's answer")
            yield
        finally:
            manager.terminate()
            manager.wait(60)
            subprocess.run(
                [sys.executable, "-c", "from tmem.backends import segment; segment.destroy('default')"],
                env=self._env,
                check=True,
            )

    def _ask(self, operation: str) -> dict[str, object] | None:
        from tmem.backends.paths import SegmentPaths
        from tmem.backends.service import request
        from tmem.errors import ServiceError

        os.environ["TMEM_RUNTIME_DIR"] = str(self._directory)
        try:
            return request(SegmentPaths.of("default"), {"op": operation})
        except ServiceError:
            return None

    def measure(self, full: bool) -> float:
        """Return the bytes a second at which a program gets 90 % of the memory."""
        with self._managed():
            held = 0
            filler = None
            if full:
                filler = _in_group(
                    self.group,
                    [sys.executable, "-c", FILLER],
                    self._env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                assert filler.stdout is not None
                words = filler.stdout.readline().split()
                if len(words) != 2:
                    raise RuntimeError("who fills the pool has failed")
                held = int(words[1])
            size, before = self._total * 9 // 10, _kills(self.group)
            taker = _in_group(self.group, [str(self._taker), str(size)], self._env, stdout=subprocess.PIPE)
            out, _ = taker.communicate(timeout=300)
            if taker.returncode or _kills(self.group) > before:
                raise RuntimeError(f"the program ended with {taker.returncode}: out of memory?")
            taken: dict[str, float] = json.loads(out)
            self.rounds.append({"full": full, "held_bytes": held, "bytes": size, **taken})
            rate, cpu_rate = (size / taken[key] / 1e9 for key in ("seconds", "cpu_seconds"))
            kind = "full" if full else "empty"
            print(
                f"    {kind}: {rate:.2f} GB/s, {cpu_rate:.2f} a second of its CPU time, pool held "
                f"{held >> 20} MiB, slowest MiB {taken['worst_mib_seconds'] * 1e3:.1f} ms",
                flush=True,
            )
            self.rounds[-1]["manager"] = (self._ask("ping") or {}).get("statistics")
            if filler is not None:
                assert filler.stdin is not None
                filler.stdin.close()
                filler.wait(60)
            return size / taken["seconds"]


def run(total_bytes: int, rounds: int) -> dict[str, object]:
    """Take turns with a full and an empty pool in a group of `total_bytes`."""
    with workplace() as directory, memory_group(total_bytes) as group:
        taker = directory / "taker"
        subprocess.run(
            [
                "gcc",
                "-O2",
                "-std=c11",
                "-D_GNU_SOURCE",
                str(ROOT / "scripts/bench.d/taker.c"),
                "-o",
                str(taker),
            ],
            check=True,
        )
        world = _World(directory, group, total_bytes, taker)
        rates = take_turns(
            {"empty": lambda: world.measure(False), "full": lambda: world.measure(True)}, rounds
        )
        ratio = paired_ratio(rates["full"], rates["empty"])
        cpu_s = {
            full: [each["cpu_seconds"] for each in world.rounds if each["full"] is full]
            for full in (True, False)
        }
        cpu = paired_ratio(cpu_s[False], cpu_s[True])
    verdict = "reached" if ratio >= TARGET else "MISSED"
    print(
        f"  90 % of {total_bytes >> 20} MiB with a full pool: {ratio:.2f} of the speed with an empty one   "
        f"target {TARGET:.2f} {verdict} ({cpu:.2f} by its CPU time, on a busy machine); nobody was killed"
    )
    return {
        "total_bytes": total_bytes,
        "rates": rates,
        "ratio": ratio,
        "cpu_ratio": cpu,
        "rounds": world.rounds,
    }
