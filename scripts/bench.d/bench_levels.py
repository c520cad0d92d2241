"""Levels of zstd for cold pages: memory and CPU time, by the core's own code, on pages of real programs."""

import json
import subprocess
import tempfile
from pathlib import Path

from bench_store import build

from tmem.bench.pages import collect

LEVELS = (1, 3, 6, 9, 12, 15, 19)


def run(npages: int) -> dict[str, object]:
    """Measure `npages` of all programs; ratios are to LZ4, rounded to size classes, times of one page."""
    with tempfile.TemporaryDirectory() as disk:
        pages = Path(disk) / "pages"
        found = collect(pages)
        for name, package in found.missing:
            print(f"  without {name}: apt-get install {package}")
        program = build(Path(disk), "levels")
        levels = [str(level) for level in LEVELS]
        argv = [str(program), str(pages), str(npages), *levels]
        figures: dict[str, object] = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    rows = figures["levels"]
    assert isinstance(rows, list)
    print(f"  {figures['pages']} pages of {len(found.by_program)} programs, ratios to LZ4")
    print("  level  alone      us  expand   four    us a page   dictionary      us   one call, us     KiB")
    for row in rows:
        print(
            f"  {row['level']:5} {row['alone']:6.2f} {row['compress_us']:7.1f} {row['expand_us']:7.1f}"
            f" {row['packed']:6.2f} {row['pack_us']:12.1f} {row['dictionary']:12.2f}"
            f" {row['dictionary_us']:7.1f} {row['most_us']:14.0f} {row['memory_bytes'] / 1024:7.0f}"
        )
    return figures
