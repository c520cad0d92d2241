"""Real swap: a hog in a memory cgroup smaller than itself, our server beside nbdkit's memory plugin.

Both go the same way: nbdkit, nbdfuse, a loop device, mkswap, swapon. Speed is random touches a second,
space is what holds the swapped pages when the hog has verified them: the resident memory of nbdkit, and of
ours the whole segment file with metadata and reserve as well.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, memory_group, paired_ratio, running, wait_until, workplace

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.nbd import attach, server, swap
from tmem.nbd.export import Export

HOG = 384 << 20
GROUP_LIMIT = 96 << 20
DEVICE = 512 << 20
SPEED_TARGET = 0.9
SPACE_TARGET = 0.5


@dataclass
class Turn:
    """What one run of the hog on one peer gave."""

    touches_per_s: float
    held_bytes: int
    swapped_out_pages: int
    swapped_in_pages: int


def resident_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process; a mapped segment is counted by its file."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(fields["RssAnon"].split()[0]) << 10


def _hog(group: Path, seconds: float) -> dict[str, float]:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "scripts" / "hog.py")),
            *(f"--size={HOG}", f"--seconds={seconds}", f"--cgroup={group}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the hog found wrong pages or failed: {done.stdout}{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def turn(name: str, seconds: float) -> Turn:
    """Run the hog once on a fresh device of the peer `name`."""
    with workplace() as directory, memory_group(GROUP_LIMIT) as group, ExitStack() as stack:
        paths = SegmentPaths("bench", directory)
        paths.state.mkdir(mode=0o700)
        export = Export("bench", DEVICE, unix=str(directory / "server.sock"))
        if name == "tmem":
            segment = _native.create(str(paths.segment), DEVICE)
            stack.callback(segment.close)
            segment.client("bench").new_pool(persistent=True)
            stack.enter_context(
                running([sys.executable, "-c", _MANAGER, str(directory)])
            )  # the service with its reserve, as in real use
            export.save(paths)
            argv = server.command(paths, "bench")  # the launcher: small stacks, one malloc arena
        else:
            allocator = {"memory": [], "memory-zstd": ["allocator=zstd"]}[name]
            argv = ["nbdkit", "-f", "-U", str(export.unix), "memory", str(DEVICE), *allocator]
        process = stack.enter_context(running(argv))

        if name == "tmem":
            server.wait_ready(export)
        else:
            wait_until(Path(str(export.unix)).exists, f"the server of {name}")
        attached = attach.attach(paths, export)
        stack.callback(attach.detach, paths, attached)
        assert attached.attachment is not None
        assert attached.attachment.device is not None
        device = attached.attachment.device
        swap.on(device, priority=32767)
        stack.callback(swap.off, device)
        figures = _hog(group, seconds)
        held = resident_bytes(process.pid)
        if name == "tmem":
            held += paths.segment.stat().st_blocks * 512
        return Turn(
            figures["touches_per_s"],
            held,
            int(figures["swapped_out_pages"]),
            int(figures["swapped_in_pages"]),
        )


_MANAGER = """
import sys
from pathlib import Path
from tmem.backends import _native, manager
from tmem.backends.paths import SegmentPaths
paths = SegmentPaths("bench", Path(sys.argv[1]))
manager.run(paths, _native.attach(str(paths.segment)))
"""


def run(rounds: int, seconds: float, peers: tuple[str, ...] = ("memory", "memory-zstd")) -> dict[str, object]:
    """Measure ours and `peers` in turn; touches a second and bytes held by peer, and the ratios."""
    turns: dict[str, list[Turn]] = {name: [] for name in ("tmem", *peers)}
    for number in range(rounds):
        for name in turns if number % 2 == 0 else reversed(turns):
            turns[name].append(turn(name, seconds))
            last = turns[name][-1]
            print(
                f"  {name:12} {last.touches_per_s:8.0f} touches/s  {last.held_bytes >> 20:4} MiB held  "
                f"{last.swapped_out_pages} pages out, {last.swapped_in_pages} in",
                flush=True,
            )
    ratios: dict[str, dict[str, float]] = {}
    for peer in peers:
        speed = paired_ratio([t.touches_per_s for t in turns["tmem"]], [t.touches_per_s for t in turns[peer]])
        space = paired_ratio([t.held_bytes for t in turns["tmem"]], [t.held_bytes for t in turns[peer]])
        ratios[peer] = {"speed": speed, "space": space}
        verdict = ""
        if peer == "memory":
            verdict = (
                f"targets {SPEED_TARGET} {'reached' if speed >= SPEED_TARGET else 'MISSED'}, "
                f"{SPACE_TARGET} {'reached' if space <= SPACE_TARGET else 'MISSED'}"
            )
        print(f"  {speed:.2f} of the touches of {peer} in {space:.2f} of its memory  {verdict}", flush=True)
    return {"turns": {name: [vars(t) for t in of] for name, of in turns.items()}, "ratios": ratios}
