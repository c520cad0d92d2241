"""Measure what the project promises, beside its peers, in one run.

Prints ratios and whether each target is reached; --json keeps every round and the machine's line.
"""

import argparse
import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import bench_declined
import bench_fuse
import bench_levels
import bench_names
import bench_pages
import bench_prefetch
import bench_pressure
import bench_save
import bench_slow
import bench_stale
import bench_store
import bench_tiers
import bench_tree

from tmem.bench import density, nbd, swap
from tmem.bench.grounds import go_before_others
from tmem.bench.machine import machine
from tmem.bench.parts import Effort, Part
from tmem.bench.report import table


def packaged(part: Part, quick: bool) -> dict[str, object]:
    """Measure what ``tmem bench`` measures."""
    outcome = part.run(Effort(quick), lambda what: None)
    Console(highlight=False, width=110).print(table(outcome.rows))
    for lacking in outcome.lacking:
        print(f"  without {lacking.what}: {lacking.reason}")
    return outcome.document()


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "parts",
        nargs="*",
        help="store, density, nbd, swap, save, fuse, declined, tree, slow, pressure, giveback, pages, tiers, "
        "stale, prefetch, names, levels; all of them by default",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a first impression")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args()
    quick = options.quick
    parts: dict[str, Callable[[], dict[str, object]]] = {
        "store": lambda: bench_store.run(400_000 if quick else 4_000_000, 70_000 if quick else 700_000),
        "density": lambda: packaged(density.PART, quick),
        "nbd": lambda: packaged(nbd.PART, quick),
        "swap": lambda: packaged(swap.PART, quick),
        "save": lambda: bench_save.run((128 if quick else 512) << 20, 3 if quick else 7),
        "fuse": lambda: bench_fuse.run(bench_fuse.QUICK if quick else bench_fuse.Sizes()),
        "declined": lambda: bench_declined.run(bench_declined.QUICK if quick else bench_declined.Sizes()),
        "tree": lambda: bench_tree.run(bench_tree.QUICK if quick else bench_tree.Sizes()),
        "pressure": lambda: bench_pressure.run((2 if quick else 4) << 30, 3 if quick else 5),
        "giveback": lambda: {
            kind: bench_pages.giveback(
                102_400 if quick else 1_024_000, kind != "ephemeral", packed=kind == "packed"
            )
            for kind in ("persistent", "packed", "ephemeral")
        },
        "pages": lambda: bench_pages.run(1_024_000 if quick else 16_000_000),
        "slow": lambda: bench_slow.run(bench_slow.QUICK if quick else bench_slow.Sizes()),
        "tiers": lambda: bench_tiers.run(3 if quick else 7, 16 if quick else 40),
        "stale": lambda: bench_stale.run(45 if quick else 180),
        "names": lambda: bench_names.run(bench_names.QUICK if quick else bench_names.Sizes()),
        "levels": lambda: bench_levels.run(4_096 if quick else 16_384),
        "prefetch": lambda: bench_prefetch.run(3 if quick else 5, 128 << 20),
    }
    if unknown := [part for part in options.parts if part not in parts]:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(parts)}")
    # Or what is mounted, attached and running would stay.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.nice(-20)  # who is measured goes before whatever else this machine does
    go_before_others(os.getpid())
    atexit.register(lambda: (os.nice(20), go_before_others(os.getpid())))  # the session is the shell's, too
    results: dict[str, object] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    for name in options.parts or parts:
        print(name)
        results[name] = parts[name]()
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
