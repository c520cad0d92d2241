"""Guests that swap to the host's tmem, which is what tmem was made for.

Two ways lead there: the kernel's nbd driver over the network, and QEMU's own NBD client behind a virtio disk.

The kernel's client speaks plain TCP here: nbd-client knows TLS with certificates only, and does it by a
process in the guest that swap would have to wait for. Pre-shared keys are shown with QEMU's client and with
libnbd's.
"""

import subprocess
import time
from pathlib import Path

from .cache import GuestError
from .host import Host
from .machine import Command, Guest, Options
from .scenarios import Figures, Setting, demand, last_json, scenario

GUEST = Options(memory_mib=128)
HOG, LONG_HOG = "96M", "160M"  # in a guest of 128 MiB, of which the kernel leaves 92 and 45 are free
SMALL_GUEST, SMALL_HOG = Options(memory_mib=112), "40M"  # a page out and in again costs an emulated CPU 3 ms
DEVICE = "192M"
CAP_BYTES = 7 << 20
CAPPED_HOG = "54M"  # with the pages that its cap admits there is room for it


def swap_on(guest: Guest, device: str) -> None:
    """Make swap of a device and use it, with discards of single pages and of all of it."""
    guest.run(["mkswap", device])
    guest.run(["swapon", "--discard", device])


def swap_off(guest: Guest, device: str) -> None:
    """Bring everything back into RAM and stop using the device."""
    guest.run(["swapoff", device], 300)


def attach(guest: Guest, port: int, export: str, device: str = "/dev/nbd0") -> None:
    """Attach an export of the host by the kernel's nbd driver."""
    guest.run(["nbd-client", "-b", "4096", "-N", export, "10.0.2.2", str(port), device])


def start_hog(guest: Guest, size: str, seconds: float) -> Command:
    """Start a hog that is known to have begun."""
    return guest.start(["guest-tool", "hog", "-s", size, "-t", f"{seconds:g}"])


@scenario("network")
def network(setting: Setting) -> Figures:
    """Three guests at once swap over TCP, one of them capped, while precaches want the same memory."""
    host = setting.host("160M" if setting.long else "56M")
    ports = {name: host.serve_tcp(name, DEVICE) for name in ("one", "two", "capped")}
    host.tmem("set", "capped", "--cap", str(CAP_BYTES))
    # Weights are about ephemeral memory: they must not cost these guests a page.
    host.tmem("set", "one", "--weight", "1")
    least = GUEST if setting.long else SMALL_GUEST
    guests = {name: setting.guest(name, GUEST if name == "capped" else least) for name in ports}
    heavy, light = host.fill("files-heavy", 300), host.fill("files-light", 100)
    for name, guest in guests.items():
        guest.wait_booted()
        attach(guest, ports[name], name)
        swap_on(guest, "/dev/nbd0")
        guest.watch(stall_s=90)
    before = heavy.bytes + light.bytes
    size, seconds = (LONG_HOG, 60.0) if setting.long else (SMALL_HOG, 3.0)
    hogs = {
        name: start_hog(guest, CAPPED_HOG if name == "capped" else size, seconds)
        for name, guest in guests.items()
    }
    figures: Figures = {}
    squeezed = before
    ratio = 0.0
    while any(hog.running for hog in hogs.values()):
        now = heavy.bytes + light.bytes
        if now < squeezed:
            squeezed, ratio = now, heavy.bytes / max(light.bytes, 1)
        demand(not any(guest.is_hung() for guest in guests.values()), "no guest hangs")
        time.sleep(0.5)
    for name, hog in hogs.items():
        figures[name] = _ended(host, guests[name], hog, name)
    demand(figures["capped"]["refused"] > 0, f"the capped guest is refused writes: {figures['capped']}")
    for name in ("one", "two"):
        demand(figures[name]["refused"] == 0, f"{name} is refused nothing: {figures[name]}")
        demand(figures[name]["pages_max"] > 3000, f"{name} swapped: {figures[name]}")
    demand(squeezed < before / 2, f"precaches give way: {before} bytes, then {squeezed}")
    demand(2 < ratio < 4.5, f"they keep the ratio of their weights, 3: {ratio}")
    figures |= {"ephemeral_before": before, "ephemeral_least": squeezed, "ephemeral_ratio": round(ratio, 2)}
    return figures


def _ended(host: Host, guest: Guest, hog: Command, client: str, device: str = "/dev/nbd0") -> Figures:
    """Check a hog that has ended, its swap device and the pool behind it; the figures."""
    figures = last_json(hog.wait(300))
    pool = host.pool(client)
    demand(figures["bad_pages"] == 0, f"{client}: no page is lost: {figures}")
    # The hog's pages are free now, and the kernel says so when it next uses the clusters, or at swapoff.
    swap_off(guest, device)
    guest.run(["swapon", "--discard", device])
    guest.run(["swapoff", device])
    after = host.pool(client)
    demand(after["pages"] < 256, f"{client}: discards end its pages: {pool['pages']}, then {after['pages']}")
    demand(after["flushes_found"] > 0, f"{client}: discards reach the pool: {after}")
    demand(after["corrupt_pages"] == 0, f"{client}: no page is corrupt: {after}")
    return figures | {
        "pages_max": after["pages_max"],
        "puts": after["puts"],
        "gets": after["gets"],
        "refused": after["puts_refused"],
        "flushes": pool["flushes_found"],
        "flushes_at_swapon": after["flushes_found"] - pool["flushes_found"],
        "boot_s": round(guest.boot_s or 0, 1),
    }


@scenario("virtio")
def virtio(setting: Setting) -> Figures:
    """A guest swaps to virtio disks of QEMU's NBD client, by unix socket and TCP with a key; servers die."""
    host = setting.host("128M")
    socket = host.directory / "disk.sock"
    host.serve("unix", "96M", "--unix", str(socket))
    keys = host.keys("alice")
    port = host.serve_tcp("psk", "96M", "--tls-psk", str(keys))
    parked = "discard=unmap,format=raw,file.driver=nbd,file.reconnect-delay=60"
    options = Options(
        memory_mib=128,
        disks=(
            f"{parked},file.server.type=unix,file.server.path={socket},file.export=unix",
            f"{parked},file.server.type=inet,file.server.host=127.0.0.1,file.server.port={port},"
            "file.export=psk,file.tls-creds=key",
        ),
        qemu=("-object", f"tls-creds-psk,id=key,endpoint=client,dir={keys.parent},username=alice"),
    )
    guest = setting.guest("virtio", options).wait_booted()
    devices = {"unix": "/dev/vdb", "psk": "/dev/vdc"}
    for device in devices.values():
        # A virtio disk says that it rotates, and of such the kernel discards nothing but all of it at swapon.
        guest.run(f"echo 0 >/sys/block/{device.removeprefix('/dev/')}/queue/rotational")
        guest.run(["mkswap", device])
        guest.run(["swapon", "--discard", "--priority", "5", device])  # the same: both are used in turn
    guest.watch(stall_s=120)
    hog = start_hog(guest, LONG_HOG if setting.long else HOG, 60 if setting.long else 8)
    kills = 0
    for client in devices:
        _wait_for_pages(host, client, 2000)
        kills += host.kill_servers(client)
    hog.wait_for("touch", 300)
    for client in devices:
        kills += host.kill_servers(client)
    figures: Figures = last_json(hog.wait(400))
    demand(figures["bad_pages"] == 0, f"no page is lost: {figures}")
    demand(kills >= 4, f"every server was killed twice: {kills} kills")
    demand("I/O error" not in guest.console(), f"no request failed: {guest.console_tail()}")
    for client, device in devices.items():
        swap_off(guest, device)
        pool = host.pool(client)
        figures[client] = {name: pool[name] for name in ("pages_max", "puts", "gets", "flushes_found")}
        demand(pool["pages_max"] > 2000, f"{client} was used: {pool}")
        demand(pool["flushes_found"] > 2000, f"{client}: discards reach the pool: {pool}")
    return figures | {"kills": kills, "boot_s": round(guest.boot_s or 0, 1)}


def _wait_for_pages(host: Host, client: str, npages: int, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while host.pool(client)["pages"] < npages:
        demand(time.monotonic() < deadline, f"{client} gets {npages} pages within {timeout_s:g} s")
        time.sleep(0.2)


@scenario("isolation")
def isolation(setting: Setting) -> Figures:
    """A guest reaches its own pages only: keys over TCP, one export a server, modes of unix sockets."""
    host = setting.host("32M")
    mine, other = host.keys("mine"), host.keys("other")
    ports = {
        "mine": host.serve_tcp("mine", "16M", "--tls-psk", str(mine)),
        "other": host.serve_tcp("other", "16M", "--tls-psk", str(other)),
    }
    plain = host.serve_tcp("plain", "16M")
    host.serve("local", "16M")
    public = setting.logs / "public"
    public.mkdir(mode=0o755)
    open_socket = public / "open.sock"
    host.serve("open", "16M", "--unix", str(open_socket))
    guest = setting.guest("isolation").wait_booted()
    guest.put("/root/mine.psk", mine.read_bytes(), 0o600)
    # The user of the other key, with one's own key: a guess at everything but the secret.
    secret = mine.read_text().partition(":")[2]
    guest.put("/root/guess.psk", f"other:{secret}", 0o600)

    def reaches(port: int, export: str, user: str | None = None, file: str = "mine.psk") -> bool:
        scheme = "nbds" if user else "nbd"
        name = f"{user}@" if user else ""
        query = f"?tls-psk-file=/root/{file}" if user else ""
        uri = f"{scheme}://{name}10.0.2.2:{port}/{export}{query}"
        result = guest.run(["nbdinfo", "--size", uri], check=False)
        demand(result.rc in (0, 1), f"nbdinfo runs: {result}")
        return result.rc == 0

    tried = {
        "its own": (reaches(ports["mine"], "mine", "mine"), True),
        "another's, with its own key": (reaches(ports["other"], "other", "mine"), False),
        "another's, with a guess": (reaches(ports["other"], "other", "other", "guess.psk"), False),
        "another's, without a key": (reaches(ports["other"], "other"), False),
        "another's name at its own server": (reaches(ports["mine"], "other", "mine"), False),
        "a name that is not this server's": (reaches(plain, "mine"), False),
        "its name where no key is asked for": (reaches(plain, "plain"), True),
    }
    # The kernel's client is refused the same, and no device comes of it.
    try:
        attach(guest, plain, "mine")
    except GuestError:
        tried["another's name by the kernel"] = (False, False)
    else:
        tried["another's name by the kernel"] = (True, False)
    # In the closed directory of its segment, and in one that everybody may enter: then its mode decides.
    closed = next((host.directory / "default.d").glob("*local*.sock"))
    for socket in (closed, open_socket):
        tried[f"the socket {socket.name} as its owner"] = (_connects(socket), True)
        tried[f"the socket {socket.name} as somebody else"] = (_connects(socket, uid=65534), False)
    for what, (reached, wanted) in tried.items():
        demand(reached == wanted, f"{what}: {'reached' if reached else 'refused'}")
    mode = closed.parent.stat().st_mode & 0o777
    demand(mode == 0o700, f"the directory of sockets is closed: {mode:o}")
    return {what: reached for what, (reached, _) in tried.items()}


def _connects(path: Path, uid: int | None = None) -> bool:
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    # The system's own Python: that of the project need not be readable for others.
    argv = ["/usr/bin/python3", "-c", program]
    if uid is not None:
        argv = ["setpriv", f"--reuid={uid}", "--clear-groups", *argv]
    return subprocess.run(argv, capture_output=True, check=False, timeout=30).returncode == 0
