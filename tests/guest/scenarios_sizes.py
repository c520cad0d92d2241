"""A machine that gives memory back and gets it again: a segment with a range in it, and the balloon.

Both on a guest with control groups v2. The first swaps to a disk, has a segment of its own that follows the
memory to spare, filled by ephemeral pages, and a program that takes most of what there is. The second swaps
to the host's tmem and lets the balloon shrink it, with QEMU's virtio-balloon telling the host of pages that
are free (free page reporting), so what the guest does not use is the host's.
"""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import Command, Guest, Options
from .scenarios import Figures, Setting, demand, last_json, scenario
from .scenarios_hosts import attach, swap_on

MIB = 1 << 20
LEAST_MIB, MOST_MIB = 16, 160
TAKEN = 0.9
"""How much of what is available the program takes."""

_FILLER = """
import json, os, sys, time
from tmem.backends import _native
store = _native.attach("/run/tmem/default")
pool = store.client("files").new_pool(persistent=False, exclusive=False)
store.client("files").hold()
noise, index, count, said = os.urandom(8192), 0, int(sys.argv[1]), 0.0
began = time.monotonic()
def number(file, name):
    with open(file) as lines:
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)
while True:
    for _ in range(count):
        pool.put(bytes(24), index, index.to_bytes(8, "little") + noise[index % 4096 :][:4088])
        index += 1
    now = time.monotonic() - began
    if now - said >= 0.25:
        said = now
        print(json.dumps([round(now, 2), store.limits[0], store.occupied[0],
            number("/proc/meminfo", "MemAvailable:") << 10, number("/proc/vmstat", "pswpout"),
            number("/proc/vmstat", "oom_kill")]), flush=True)
    time.sleep(0.02)
"""
"""Puts so many pages 50 times a second, as a mount does whose files are read, and says what it sees: seconds,
limit, used, available, pages swapped out, processes killed."""

_NOISE_WORDS = "50"
"""Of a page's 512: making noise is most of the time that an emulated CPU takes for a page."""

Row = list[float]


@scenario("range")
def range_(setting: Setting) -> Figures:
    """A program takes nine tenths of a guest that a segment with a range has filled with ephemeral pages."""
    disk = setting.logs / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(512 * MIB)
    options = Options(memory_mib=384, cpus=2, disks=(f"file={disk},format=raw",))
    guest = setting.guest("range", options).wait_booted()
    swap_on(guest, "/dev/vdb")
    guest.start(["tmem", "start", "--memory", f"{LEAST_MIB}M..{MOST_MIB}M"])
    answers = "test -S /run/tmem/default.d/control.sock"
    _until(lambda: guest.run(answers, check=False).rc == 0, "the manager answers", 300)
    guest.put("/srv/filler.py", _FILLER)
    hold_s = 60 if setting.long else 20
    taken = int(_available(guest) * TAKEN)
    # The same beside an empty segment first: what it swaps then is not the segment's doing.
    alone = _take(guest, taken, hold_s)
    filler = guest.start(["python3", "/srv/filler.py", "40"])
    _until(lambda: _full(_rows(filler)), "the pool fills what the machine can spare", 300)
    before = _rows(filler)[-1]
    rounds = []
    for _ in range(5 if setting.long else 2):
        began = _rows(filler)[-1][0]
        rounds.append(_take(guest, taken, hold_s))
        seen = [row for row in _rows(filler) if row[0] > began]
        rounds[-1] |= {
            "limit_least_mib": _mib(min(row[1] for row in seen)),
            "limit_turns": turns([row[1] for row in seen], 8 * MIB),
            "available_least_mib": _mib(min(row[3] for row in seen)),
        }
        _until(lambda: _full(_rows(filler)), "the segment grows again", 300)
        again = [row[1] for row in _rows(filler) if row[0] > seen[-1][0]]
        rounds[-1]["grew_turns"] = turns(again, 8 * MIB)
    demand(filler.running, f"the filler lives: {filler.stdout[-300:]}")
    after = _rows(filler)[-1]
    filler.signal(9)
    figures: Figures = {
        "taken_mib": _mib(taken),
        "full_mib": _mib(before[2]),
        "alone": alone,
        "rounds": rounds,
        "oom_kills": after[5],
    }
    demand(after[5] == 0, f"nobody is killed: {figures}")
    demand("Out of memory" not in guest.console(), f"the kernel kills nobody: {guest.console_tail(5)}")
    swapped = alone["swapped_out"] + taken // 4096 // 100
    for one in rounds:
        demand(one["bad_pages"] == 0, f"no page is lost: {figures}")
        demand(one["swapped_out"] <= swapped, f"it does not swap: {figures}")
        demand(one["limit_least_mib"] < _mib(before[1]) / 2, f"the segment gives way: {figures}")
        demand(one["limit_turns"] <= 1 and one["grew_turns"] <= 1, f"the limit does not oscillate: {figures}")
    return figures


def turns(limits: list[float], band: float) -> int:
    """Count how often a limit turned around, where it moved by more than `band`: down and up again is one."""
    count, direction, extreme = 0, 0, limits[0]
    for limit in limits:
        if (limit - extreme) * direction > 0:
            extreme = limit
        elif abs(limit - extreme) > band:
            count += direction != 0
            direction, extreme = (1 if limit > extreme else -1), limit
    return count


def _take(guest: Guest, size: int, hold_s: int) -> Figures:
    """Have a program take so many bytes, touch them now and then, and verify them; what it cost."""
    swapped = _counter(guest, "pswpout")
    argv = ["guest-tool", "hog", "-s", str(size), "-t", str(hold_s), "-p", "20", "-c", _NOISE_WORDS]
    figures = last_json(guest.run(argv, 600))
    wanted = ("bad_pages", "fill_s", "slowest_touch_ms")
    return {name: figures[name] for name in wanted} | {"swapped_out": _counter(guest, "pswpout") - swapped}


def _rows(filler: Command) -> list[Row]:
    lines = filler.stdout.splitlines()
    demand(filler.running, f"the filler runs: {lines[-3:]}")
    return [json.loads(line) for line in lines if line.endswith("]")]


def _full(rows: list[Row]) -> bool:
    """Say whether the segment is as large as it gets: within a sixteenth for six seconds, and filled."""
    last = [row for row in rows if row[0] > rows[-1][0] - 6]
    limit = rows[-1][1] if rows else 0
    return (
        len(last) >= 4
        and limit > 2 * LEAST_MIB * MIB
        and all(abs(row[1] - limit) < limit / 16 for row in last)
        and rows[-1][2] > limit * 0.8
    )


def _available(guest: Guest) -> int:
    return int(guest.run("grep MemAvailable /proc/meminfo").stdout.split()[1]) << 10


def _counter(guest: Guest, name: str) -> int:
    return int(guest.run(f"grep -w {name} /proc/vmstat").stdout.split()[1])


def _until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        demand(time.monotonic() < deadline, f"{what} within {timeout_s:g} s")
        time.sleep(0.5)


def _mib(size: float) -> float:
    return round(size / MIB, 1)


_GROUP = "/sys/fs/cgroup/work"
MEMORY_MIB, IDLE_MIB, BUSY_MIB = 384, 112, 24
NEED_MIB = 112
_REPORTING_ORDER = 0
"""Free memory is the host's by single pages, not in pieces of 2 MiB as a kernel has it at first."""


@scenario("balloon")
def balloon(setting: Setting) -> Figures:
    """The balloon shrinks a guest to what it uses, and a sudden need in the guest is met at once."""
    host = setting.host("384M")
    port = host.serve_tcp("guest", "384M")
    reporting = ("-device", "virtio-balloon-pci,free-page-reporting=on")
    guest = setting.guest("balloon", Options(memory_mib=MEMORY_MIB, cpus=2, qemu=reporting)).wait_booted()
    guest.run(f"echo {_REPORTING_ORDER} >/sys/module/page_reporting/parameters/page_reporting_order")
    attach(guest, port, "guest")
    swap_on(guest, "/dev/nbd0")
    guest.run(["mkdir", _GROUP])
    assert guest.process is not None
    pid = guest.process.pid

    def hog(size_mib: int, seconds: float, pause_ms: int) -> Command:
        argv = ["guest-tool", "hog", "-g", _GROUP, "-s", f"{size_mib}M", "-t", f"{seconds:g}"]
        return guest.start([*argv, "-p", str(pause_ms), "-c", _NOISE_WORDS])

    idle, busy = hog(IDLE_MIB, 1e6, 5000), hog(BUSY_MIB, 1e6, 20)
    for one in (idle, busy):
        one.wait_for("touch", 300)
    idle.signal(signal.SIGSTOP)
    figures: Figures = {"need_before": _need(guest, hog)}
    figures |= {"used_before_mib": _mib(_used(guest)), "host_before_mib": _mib(_settled(pid))}
    controller = guest.start(["tmem", "balloon", "work", "--interval", "1", "--least", f"{BUSY_MIB}M"])
    began, looks = time.monotonic(), []
    while time.monotonic() - began < (900 if setting.long else 240):
        looks.append((round(time.monotonic() - began), _mib(_used(guest)), _mib(_ram(pid))))
        demand(controller.running, f"the balloon runs: {controller.stdout[-300:]}{controller.stderr[-300:]}")
        if looks[-1][1] < (IDLE_MIB + BUSY_MIB) / 3:
            break
        time.sleep(5)
    after = _mib(_settled(pid))
    figures |= {"used_after_mib": looks[-1][1], "host_after_mib": after, "shrunk_s": looks[-1][0]}
    pool = host.pool("guest")
    figures |= {"pool_pages": pool["pages"], "pool_mib": _mib(host.statistics()["memory"]["used_bytes"])}
    figures["need_after"] = _need(guest, hog)
    controller.signal(15)
    figures["said"] = controller.wait(60).stdout.splitlines()[-20:]
    idle.signal(signal.SIGCONT)
    for name, one in (("idle", idle), ("busy", busy)):
        one.signal(signal.SIGUSR1)  # verify everything and end
        figures[name] = last_json(one.wait(300))
    figures["oom_kills"] = _counter(guest, "oom_kill")
    figures["looks"] = looks[:: max(len(looks) // 20, 1)]
    _judge(figures)
    return figures


def _need(guest: Guest, hog: Callable[[int, float, int], Command]) -> dict[str, Any]:
    """Have a program need memory at once: how long it took to get it, and how much of that anybody waited."""
    waited = _waited_s(guest)
    done = last_json(hog(NEED_MIB, 2.0, 20).wait(300))
    figures = {name: done[name] for name in ("bad_pages", "fill_s", "slowest_touch_ms")}
    return figures | {"waited_s": round(_waited_s(guest) - waited, 3)}


def _waited_s(guest: Guest) -> float:
    """Return how long somebody has waited for memory since the guest runs."""
    return int(guest.run("grep some /proc/pressure/memory").stdout.rpartition("=")[2]) / 1e6


def _judge(figures: Figures) -> None:
    demand(figures["oom_kills"] == 0, f"nobody is killed: {figures}")
    for name in ("idle", "busy", "need_before", "need_after"):
        demand(figures[name]["bad_pages"] == 0, f"{name}: no page is lost: {figures}")
    idle = IDLE_MIB * 0.6
    demand(figures["used_before_mib"] - figures["used_after_mib"] > idle, f"the guest shrinks: {figures}")
    # What of it the host gets is told, not demanded: pages that go one by one leave little in whole pieces.
    # By the clock it is the host's load that is measured.
    demand(figures["need_after"]["waited_s"] < 1, f"a sudden need is met in time: {figures}")


def _settled(pid: int) -> int:
    """Return `_ram` once it changes no more: free memory is reported a few seconds late."""
    seen = [_ram(pid)]
    while len(seen) < 30 and (len(seen) < 4 or max(seen[-4:]) - min(seen[-4:]) > 2 * MIB):
        time.sleep(3)
        seen.append(_ram(pid))
    return seen[-1]


def _ram(pid: int) -> int:
    """Return how much of the guest's RAM is the host's memory: without what QEMU translates code into."""
    resident, right = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Size":
            right = int(rest.split()[0]) == MEMORY_MIB << 10
        elif name == "Rss" and right:
            resident = max(resident, int(rest.split()[0]) << 10)
    return resident


def _used(guest: Guest) -> int:
    return int(guest.run(["cat", f"{_GROUP}/memory.current"]).stdout)
