"""Real swap inside a guest: one hog on zram, a disk, and tmem by the kernel's nbd driver, in turn.

The hog lives in a control group of a quarter of its size, so all of them swap the same, and a round has each
of them once. QEMU emulates the CPU (tcg): what takes instructions (compression, the network stack, switches
between processes) is many times slower than on a real one, what waits is not. So the figures tell how
the parts of one run compare, and little about real machines.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .machine import Guest, Options
from .scenarios import Figures, Setting, demand, last_json, scenario
from .scenarios_hosts import attach, swap_on

ZRAM, DISK, HERE, HOST = "zram lz4", "disk", "tmem in the guest", "tmem on the host"
MACHINE = Options(cpus=2, memory_mib=512)
_GROUP = "/sys/fs/cgroup/hog"
_NOISE_WORDS = "200"
"""Of a page's 512, as scripts/hog.py has it: LZ4 makes 2.5 : 1 of it."""


@dataclass(frozen=True)
class Sizes:
    """The hog, its group and the devices, in MiB; for how many seconds it touches pages, and how often."""

    hog_mib: int
    group_mib: int
    device_mib: int
    touch_s: int
    rounds: int


SHORT, LONG = Sizes(64, 16, 80, 4, 1), Sizes(64, 16, 80, 6, 3)

Way = Callable[[], Iterator[None]]


@scenario("swap-peers")
def swap_peers(setting: Setting) -> Figures:
    """One hog swaps to zram, to a disk, and to tmem by the kernel's nbd driver: touches a second of each."""
    sizes = LONG if setting.long else SHORT
    disk = setting.logs / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(sizes.device_mib << 20)
    host = setting.host(f"{sizes.device_mib}M")
    port = host.serve_tcp("guest", f"{sizes.device_mib}M")
    guest = setting.guest("peers", replace(MACHINE, disks=(f"file={disk},format=raw",)))
    guest.wait_booted()
    guest.run(f"mkdir {_GROUP} && echo {sizes.group_mib}M >{_GROUP}/memory.max")
    guest.run(["tmem", "start", "-d", "--realtime", "--memory", f"{sizes.device_mib}M"], 120)
    attach(guest, port, "guest", "/dev/nbd3")
    ways = {
        ZRAM: _zram(guest, sizes),
        DISK: _device(guest, "/dev/vdb"),
        HERE: _tmem(guest, sizes),
        HOST: _device(guest, "/dev/nbd3"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    swapped: dict[str, list[int]] = {name: [] for name in ways}
    for number in range(sizes.rounds):
        order = [*ways] if number % 2 == 0 else [*reversed(ways)]
        for name in order:
            with contextmanager(ways[name])():
                rate, pages = _touch(guest, sizes)
            rates[name].append(rate)
            swapped[name].append(pages)
    guest.run(["nbd-client", "-d", "/dev/nbd3"])
    guest.run(["tmem", "stop"], 120)
    disk.unlink()
    return {
        "sizes": vars(sizes),
        "touches_per_s": rates,
        "swapped_in_pages": swapped,
        "of_zram": {
            name: round(statistics.median(a / b for a, b in zip(found, rates[ZRAM], strict=True)), 3)
            for name, found in rates.items()
        },
    }


def _touch(guest: Guest, sizes: Sizes) -> tuple[float, int]:
    """Let the hog do its work; touches a second while it touches, and the pages swapped in all the time."""
    before = _swapped_in(guest)
    hog = ["guest-tool", "hog", "-s", f"{sizes.hog_mib}M", "-t", str(sizes.touch_s), "-g", _GROUP]
    figures = last_json(guest.run([*hog, "-c", _NOISE_WORDS], 600))
    pages = _swapped_in(guest) - before
    demand(figures["bad_pages"] == 0, f"no page is wrong: {figures}")
    demand(pages > figures["pages"] / 2, f"the hog lives in swap: only {pages} pages came in for {figures}")
    return round(figures["touches"] / figures["touch_s"], 1), pages


def _swapped_in(guest: Guest) -> int:
    return int(guest.run("sed -n 's/^pswpin //p' /proc/vmstat").stdout)


def _zram(guest: Guest, sizes: Sizes) -> Way:
    def way() -> Iterator[None]:
        guest.run(
            f"cd /sys/block/zram0 && echo lz4 >comp_algorithm && echo {sizes.device_mib}M >disksize && "
            "mkswap /dev/zram0 && swapon /dev/zram0"
        )
        yield
        guest.run("swapoff /dev/zram0 && echo 1 >/sys/block/zram0/reset")

    return way


def _device(guest: Guest, device: str) -> Way:
    def way() -> Iterator[None]:
        swap_on(guest, device)
        yield
        guest.run(["swapoff", device], 180)

    return way


def _tmem(guest: Guest, sizes: Sizes) -> Way:
    def way() -> Iterator[None]:
        add = ["tmem", "swap", "add", "g", "--size", f"{sizes.device_mib}M", "--attach", "--realtime"]
        guest.run(
            [*add, "--force"], 180
        )  # the hog's group is the only one that is limited, and all that grows
        yield
        guest.run(["tmem", "swap", "remove", "g"], 240)

    return way
