"""``scripts/faults``: many rounds of faults, and the table of what came of them."""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tmem.backends.paths import SegmentPaths

from .rounds import FAULTS, Campaign, save, table
from .world import World


def main() -> int:
    """Run the rounds; 1 if anything was lost or hung, else 0."""
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", default=os.environ.get("TMEM_SEED"), help="repeat these (or TMEM_SEED)")
    parser.add_argument("--only", action="append", choices=FAULTS, help="only this fault; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every wait to FILE")
    options = parser.parse_args()
    seed = options.seed or str(random.SystemRandom().randrange(10**6))
    print(f"TMEM_SEED={seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="tmem-faults-"))
    runtime = Path(tempfile.mkdtemp(prefix="tmem-faults-", dir="/dev/shm"))
    os.environ["TMEM_RUNTIME_DIR"] = str(runtime)
    os.environ.pop("TMEM_NAME", None)
    world = World(SegmentPaths("default", runtime), directory, seed)
    campaign = Campaign(world, seed, {name: FAULTS[name] for name in options.only or FAULTS})
    status = 1
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        undo.callback(shutil.rmtree, runtime, ignore_errors=True)
        undo.callback(world.close)
        world.open()
        begin = time.monotonic()
        try:
            for number in range(options.rounds):
                name = campaign.next()
                if sys.stderr.isatty():
                    print(f"\r{number + 1} {name:<30}", end="", file=sys.stderr, flush=True)
                elif number % 100 == 99:
                    print(f"{number + 1} rounds", file=sys.stderr, flush=True)
            status = 0
        except AssertionError as error:
            print(f"round {number}: {error}\n{world.said()}", file=sys.stderr)
        print(f"{time.monotonic() - begin:.0f} s")
    print(table(campaign.rows))
    if options.json:
        save(campaign.rows, seed, options.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
