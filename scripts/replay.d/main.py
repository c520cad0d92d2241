"""Replay a block trace through the store and print hit ratios beside those of LRU, FIFO, SIEVE and S3-FIFO.

Sizes are percentages of the trace's footprint. "store" keeps raw pages, as many as the simulated caches: it
is to reach at least S3-FIFO and more than LRU. "store, LZ4" has the same memory and compresses.
"""

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import blocktrace

from tmem.bench import contents, replaying
from tmem.bench.caches import PEERS

SIZES = (1.0, 5.0, 10.0, 20.0, 40.0)
_LEAST_PAGES = 15
"""One chunk: of less, the store cannot keep two queues."""


def _sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,5,10") from None
    if not all(0 < size <= 100 for size in sizes):
        raise argparse.ArgumentTypeError("sizes are percentages, above 0 and up to 100")
    return sizes


def verdict(ratios: dict[str, float]) -> str:
    """Say whether the store reached its target, given the hit ratios of one size."""
    published = max(ratio for name, ratio in ratios.items() if name.startswith("S3-FIFO"))
    return "reached" if ratios["store"] >= published and ratios["store"] > ratios["LRU"] else "MISSED"


def measure(trace: blocktrace.Trace, percent: float, lz4: bool, directory: Path) -> dict[str, float]:
    """Return each cache's hit ratio at `percent` of the footprint; ValueError if that is too little."""
    room = int(trace.footprint * percent / 100)
    if room < 2 * _LEAST_PAGES:
        raise ValueError(
            f"{percent:g} % of {trace.footprint} pages is too little to measure: "
            "use a larger trace or leave this size out with --sizes"
        )
    stock = contents.collect()
    page_of = lru_cache(1 << 20)(lambda number: contents.page_of(number, stock))
    ratios = {name: simulate(trace.pages, room) / len(trace.pages) for name, simulate in PEERS.items()}
    for name, bound in (("store", replaying.Bound.PAGES), ("store, LZ4", replaying.Bound.MEMORY)):
        if bound is replaying.Bound.PAGES or lz4:
            outcome = replaying.replay(trace.pages, room, bound, page_of, directory)
            ratios[name] = outcome.hits / len(trace.pages)
    return ratios


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="replay", description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path, help="CSV with the columns version,time,op,size,lbn")
    parser.add_argument(
        "--mapping",
        choices=tuple(blocktrace.MAPPINGS),
        default="device",
        help="how requests become pages: " + "; ".join(f"{k}: {v}" for k, v in blocktrace.MAPPINGS.items()),
    )
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="percentages, by default 1,5,10,20,40")
    parser.add_argument("--raw", action="store_true", help="leave the replay with LZ4 out")
    parser.add_argument("--json", type=Path, help="write the ratios to this file as well")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="a tmpfs for the segments")
    options = parser.parse_args()
    try:
        trace = blocktrace.read(options.file, options.mapping)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(
        f"{options.file.name}: {trace.requests:,} requests, {len(trace.pages):,} accesses "
        f"to {trace.footprint:,} pages ({trace.footprint >> 8:,} MiB); mapping: {options.mapping}"
    )
    results: dict[str, dict[str, float]] = {}
    for percent in options.sizes:
        try:
            ratios = measure(trace, percent, not options.raw, options.directory)
        except ValueError as error:
            parser.error(str(error))
        if not results:
            print(f"{'size':>6}  " + "  ".join(f"{name:>12}" for name in ratios))
        results[f"{percent:g}"] = ratios
        row = "  ".join(f"{ratio:12.4f}" for ratio in ratios.values())
        print(f"{percent:>5g}%  {row}   target {verdict(ratios)}", flush=True)
    if options.json is not None:
        document = {"trace": options.file.name, "mapping": options.mapping, "ratios": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
