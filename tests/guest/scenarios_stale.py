"""How much a pool keeps for a guest that the guest's kernel does not need: live pages against kept ones.

Two guests do the same for the same time, one that discards what it has freed and one that does not. Programs
come, fill their memory, touch it again, and go, beside one that stays and one that is never touched again,
as in a machine that is used. Kept are the pages in the pool, less the device's header; held are the slots
that the kernel has in use (/proc/swaps). The difference is stale: the kernel has freed it and has not said
so. Of what is held, that which is in RAM as well (SwapCached) is nobody's only copy.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .host import Host
from .machine import Command, Guest, Options
from .scenarios import Figures, Setting, demand, last_json, scenario
from .scenarios_hosts import attach

MIB = 1 << 20
DEVICE_MIB = 224
MACHINE = Options(memory_mib=128)
STAYING_MIB, IDLE_MIB = 24, 24
AT_A_TIME = 3
SIZES_MIB, SECONDS = (8, 32), (20.0, 90.0)
"""How large programs get, and how long they touch their memory, which takes them a few milliseconds of CPU
in a second."""
PAUSE_MS = 20
LONG_S, SHORT_S, LOOK_S, AFTER_S = 3600.0, 60.0, 5.0, 30.0
LEAST_LOOKS = 12
_FOREVER = "1000000"


@dataclass
class _Machine:
    """A guest and its pool, what runs there, and what was seen: kept, held, cached pages at each look."""

    guest: Guest
    pages: Callable[[], int]
    rng: random.Random
    staying: list[Command] = field(default_factory=list)
    programs: list[Command] = field(default_factory=list)
    ended: int = 0
    rows: list[tuple[int, int, int]] = field(default_factory=list)

    def look(self) -> tuple[int, int, int]:
        """Return how many pages are kept, held, and in RAM as well."""
        words = "tail -1 /proc/swaps; grep SwapCached /proc/meminfo"
        swaps, meminfo = self.guest.run(words, 300).stdout.splitlines()
        return self.pages() - 1, int(swaps.split()[3]) // 4, int(meminfo.split()[1]) // 4

    def start(self, size_mib: int, seconds: str, pause_ms: int) -> Command:
        """Start a program; its pages differ from those of all others."""
        argv = ["guest-tool", "hog", "-s", f"{size_mib}M", "-t", seconds, "-p", str(pause_ms)]
        return self.guest.start([*argv, "-r", str(self.rng.randrange(1 << 30))])

    def refresh(self) -> None:
        """Check the programs that have ended, and start others in their place."""
        for program in [one for one in self.programs if not one.running]:
            self.programs.remove(program)
            figures = last_json(program.wait(10))
            demand(figures["bad_pages"] == 0, f"no page is lost: {figures}")
            self.ended += 1
        while len(self.programs) < AT_A_TIME:
            size, seconds = self.rng.randrange(*SIZES_MIB), self.rng.uniform(*SECONDS)
            self.programs.append(self.start(size, f"{seconds:.1f}", PAUSE_MS))


@scenario("stale")
def stale(setting: Setting) -> Figures:
    """Programs come and go in two guests, with and without discard: pages that are kept and held."""
    return measure(setting, LONG_S if setting.long else SHORT_S)


def measure(setting: Setting, seconds: float) -> Figures:
    """Do it for so long."""
    host = setting.host(f"{2 * DEVICE_MIB + 64}M")
    machines = {name: _boot(setting, host, name) for name in ("discard", "no-discard")}
    for name, machine in machines.items():
        _begin(machine, name == "discard")
    began = time.monotonic()
    with (setting.logs / "looks.jsonl").open("w") as file:
        # On a busy machine a look takes a minute.
        while (passed := time.monotonic() - began) < seconds or any(
            len(machine.rows) < LEAST_LOOKS for machine in machines.values()
        ):
            for name, machine in machines.items():
                machine.refresh()
                machine.rows.append(machine.look())
                demand(machine.guest.alive, f"the guest lives: {machine.guest.console_tail(5)}")
                file.write(json.dumps([round(passed), name, *machine.rows[-1]]) + "\n")
            file.flush()
            time.sleep(LOOK_S)
    return {name: _figures(machine) for name, machine in machines.items()}


def _boot(setting: Setting, host: Host, name: str) -> _Machine:
    port = host.serve_tcp(name, f"{DEVICE_MIB}M")
    guest = setting.guest(name, MACHINE).wait_booted()
    attach(guest, port, name)

    return _Machine(guest, host.counter(name), random.Random(1))


def _begin(machine: _Machine, discard: bool) -> None:
    machine.guest.run(["mkswap", "/dev/nbd0"])
    machine.guest.run(["swapon", *(["--discard"] if discard else []), "/dev/nbd0"])
    machine.staying.append(machine.start(IDLE_MIB, _FOREVER, 1_000_000_000))
    machine.staying.append(machine.start(STAYING_MIB, _FOREVER, PAUSE_MS))


def _figures(machine: _Machine) -> Figures:
    """End the programs, look again, have the guest bring back what is left, and sum up."""
    guest = machine.guest
    for program in machine.programs:
        program.signal(9)
    time.sleep(AFTER_S)  # discards come late
    after = machine.look()
    machine.staying[-1].signal(9)  # or there is no room for all of it
    guest.run("swapoff /dev/nbd0 && swapon --discard /dev/nbd0", 600)
    renewed = machine.look()
    counts = dict(line.split() for line in guest.run(["cat", "/proc/vmstat"]).stdout.splitlines())
    rows = [row for row in machine.rows if row[1] > 256]
    demand(len(rows) > 5, f"it swaps: {machine.rows[-3:]}")
    demand(
        all(kept >= held - cached - 1024 for kept, held, cached in rows), "what is held only there is kept"
    )
    demand(renewed[0] < max(after[0], 256), f"swapoff and swapon end what is stale: {after}, then {renewed}")
    kept, held, cached = (list(column) for column in zip(*rows, strict=True))
    ratios = [row[0] / row[1] for row in rows]
    tenth = max(len(rows) // 10, 1)
    return {
        "programs": machine.ended,
        "looks": len(rows),
        "kept_median": statistics.median(kept),
        "held_median": statistics.median(held),
        "cached_median": statistics.median(cached),
        "cached_most": max(cached),
        "kept_most": max(kept),
        "held_most": max(held),
        "kept_per_held": round(statistics.median(ratios), 2),
        "kept_per_held_most": round(max(ratios), 2),
        "kept_per_held_by_tenths": [
            round(statistics.median(ratios[at : at + tenth]), 2) for at in range(0, len(rows), tenth)
        ],
        "after_kept_held_cached": after,
        "renewed_kept_held_cached": renewed,
        "pswpout": int(counts["pswpout"]),
        "pswpin": int(counts["pswpin"]),
    }
