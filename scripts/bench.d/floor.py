"""The floor: floor.c answers READs and does nothing else, so that anybody can see how far a daemon could go.

Reported beside the peers, without a verdict: one that waits in read(2), as bindfs does; one that is awake
instead, and yields; one whose requests come over io_uring, by our own rings; the first two once more with the
file's own bytes, out of memory, where the others send the same ones, which a CPU has at hand; and for misses
one that reads the lower.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from common import ROOT

HITS = {
    "floor": (),
    "floor awake": ("-a",),
    "floor io_uring": ("-r",),
    "floor memory": ("-m",),
    "floor memory awake": ("-m", "-a"),
}
STREAMS = ("floor", "floor memory")
"""What they are called, and their options."""
MISSES = {"floor pread": ("-p",)}
FLOORS: dict[str, Sequence[str]] = {**HITS, **MISSES}


class Floor:
    """Compiles floor.c into `directory`, with the rings of the native reader."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "floor.d"  # "floor" is a mount's name
        native = ROOT / "backends/native"
        sources = [Path(__file__).with_name("floor.c"), native / "reader_rings.c", native / "reader_eager.c"]
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-pthread", f"-I{native}"]
        subprocess.run(["gcc", *flags, "-o", str(self._program), *map(str, sources)], check=True)

    def command(self, name: str) -> list[str]:
        """Return the command that serves; the lower directory and the mount point follow."""
        return [str(self._program), *FLOORS[name]]
