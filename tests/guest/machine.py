"""A guest: a virtual machine with a real kernel, commands in it, its console, and its end.

QEMU emulates it without any help of the host's CPU (tcg), so it runs everywhere and slowly: a boot takes
three to six seconds. The root is this machine's own userland with this project (`image`), shared by all
guests; what a guest writes there goes to a scratch file of its own that vanishes with it. In the guest
10.0.2.2 is the host's 127.0.0.1.

A `Guest` belongs to the thread that starts it: QEMU dies with that thread, also if the test is killed.
"""

import base64
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from . import image, kernels
from .cache import GuestError
from .channel import Channel, Command, GuestTimeout, Result

__all__ = ["Command", "Guest", "GuestError", "GuestTimeout", "Machine", "Options", "Result"]

BOOT_S = 300.0
"""How long a boot may take; on a busy machine with several guests it takes ten times what it does alone.

As all deadlines here it only says that something hangs: so it is far beyond what was ever seen."""
QEMU = "qemu-system-x86_64"


@dataclass(frozen=True)
class Options:
    """What a guest is like.

    `parameters` are added to the kernel's command line. `disks` are further virtio disks, /dev/vdb and so on,
    each the value of QEMU's -drive without ``if=`` and ``id=`` (``file=/x.img,format=raw``). `qemu` are
    further arguments. `forwards` are host TCP ports of 127.0.0.1 and the guest's ports that they lead to.
    """

    kernel: str = "6.1"
    memory_mib: int = 160
    cpus: int = 1
    parameters: str = ""
    disks: tuple[str, ...] = ()
    forwards: tuple[tuple[int, int], ...] = ()
    qemu: tuple[str, ...] = field(default=())


class Machine:
    """What all guests have in common; `Guest` and `UmlGuest` say how the kernel is started.

    A context manager: what was started has ended afterwards, by its process id. `log` is the console's file;
    it stays. `command()` must give the argv of the process; it gets the descriptor of a socket for the agent.
    """

    def __init__(self, name: str, options: Options | None = None, log: Path | None = None) -> None:
        self.name = name
        self.options = options or Options()
        self.directory = Path(tempfile.mkdtemp(prefix=f"tmem-guest-{name}-"))
        self.log = log or self.directory / "console.log"
        self.channel = Channel(name)
        self.process: subprocess.Popen[bytes] | None = None
        self.boot_s: float | None = None
        self._launched = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def launch(self) -> Self:
        """Start the machine without waiting; several may boot at once. `GuestError` if it cannot be."""
        raise NotImplementedError

    def boot(self, timeout_s: float = BOOT_S) -> Self:
        """Start the machine and wait until commands can be run."""
        self.launch()
        return self.wait_booted(timeout_s)

    def wait_booted(self, timeout_s: float = BOOT_S) -> Self:
        """Wait until commands can be run; `GuestTimeout` with the console's end if that takes too long."""
        if (
            not self._poll(lambda: self.channel.wait_hello(0.05) or not self.alive, timeout_s)
            or not self.alive
        ):
            raise GuestTimeout(f"{self.name} does not boot; the end of its console:\n{self.console_tail()}")
        self.boot_s = time.monotonic() - self._launched
        return self

    @property
    def alive(self) -> bool:
        """Whether the machine's process runs."""
        return self.process is not None and self.process.poll() is None

    # Commands

    def start(self, command: str | Sequence[str], *, keep_input: bool = False) -> Command:
        """Start a command (an argv, or text for /bin/sh) that goes on by itself."""
        argv = ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)
        started = self.channel.start(argv)
        if not keep_input:
            started.close_input()
        return started

    def run(
        self, command: str | Sequence[str], timeout_s: float = 180.0, *, check: bool = True, data: bytes = b""
    ) -> Result:
        """Run a command to its end, with `data` as its input.

        Raises `GuestError` if it fails (unless `check` is False), `GuestTimeout` if it takes too long; then
        it is killed, as far as that can be done.
        """
        running = self.start(command, keep_input=True)
        try:
            running.feed(data, timeout_s)
            running.close_input(timeout_s)
            result = running.wait(timeout_s)
        except GuestTimeout as error:
            with contextlib.suppress(GuestError):
                running.signal(signal.SIGKILL)
            raise GuestTimeout(f"{error}\nthe end of the console:\n{self.console_tail()}") from None
        if check and result.rc != 0:
            raise GuestError(
                f"{running} ended with {result.rc}\n{result.stdout[-2000:]}{result.stderr[-2000:]}".rstrip()
            )
        return result

    def put(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Write a file in the guest."""
        content = data.encode() if isinstance(data, str) else data
        quoted = shlex.quote(path)
        self.run(f"umask 077; cat >{quoted} && chmod {mode:o} {quoted}", data=content)

    def get(self, path: str, timeout_s: float = 180.0) -> bytes:
        """Read a file of the guest."""
        text = self.run(["base64", path], timeout_s).stdout
        return base64.b64decode(text)

    # Console, hangs

    def console(self) -> str:
        """Return what the console has shown until now."""
        try:
            return self.log.read_bytes().decode(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""

    def console_tail(self, lines: int = 40) -> str:
        """Return the last lines of the console."""
        return "\n".join(self.console().splitlines()[-lines:])

    def wait_console(self, text: str, timeout_s: float) -> str:
        """Wait for `text` on the console and return its line; `GuestTimeout` if it does not come."""
        if not self._poll(lambda: text in self.console(), timeout_s):
            raise GuestTimeout(f"{self.name}: no {text!r} on the console; its end:\n{self.console_tail()}")
        return next(line for line in self.console().splitlines() if text in line)

    def watch(self, stall_s: float = 40, keys: str = "mw", *, reset: bool = False) -> Command:
        """Start the watchdog: a heartbeat on the console, and HANG after `stall_s` seconds without a page.

        Only while a hog runs, for that is what makes pages. `keys` are the sysrq keys for the post mortem;
        with `reset` the machine ends after it.
        """
        argv = ["guest-tool", "beat", "-n", f"{stall_s:g}", "-k", keys, *(["-b"] if reset else [])]
        watchdog = self.start(argv)
        self.wait_console("beat 1:", 180)
        return watchdog

    def is_hung(self, timeout_s: float = 60.0) -> bool:
        """Say whether the watchdog saw a stall that has not ended, or the agent does not answer in time."""
        console = self.console()
        return console.rfind("HANG: ") > console.rfind("MOVES AGAIN") or not self.channel.ping(timeout_s)

    def wait_hang(self, timeout_s: float) -> bool:
        """Wait for the watchdog to see a stall; whether it did."""
        return self._poll(lambda: "HANG: " in self.console() or not self.alive, timeout_s)

    def close(self) -> None:
        """End the machine by its process id, whatever state it is in, and remove what it used.

        A console's file that was named when the guest was made stays.
        """
        self.channel.close()
        if self.process is not None:
            # The whole group, which is its alone: user-mode-linux has a process for each of its own.
            group = self.process.pid
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self.process.wait(30)
            self._poll(lambda: not _exists(group), 10)
        shutil.rmtree(self.directory, ignore_errors=True)

    @staticmethod
    def _poll(condition: Callable[[], object], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Guest(Machine):
    """A guest in QEMU: several CPUs, the kernel's own nbd driver, a network of its own."""

    def launch(self) -> Self:
        """Start QEMU."""
        argv = self.command()
        self._launched = time.monotonic()
        # It must not outlive a test that is killed, whatever kills it.
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        with (self.directory / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.directory)},
                start_new_session=True,
            )
        if not self._poll(lambda: self._connected() or not self.alive, 30) or not self.alive:
            words = (self.directory / "qemu.log").read_text(errors="replace").strip()
            self.close()
            raise GuestError(f"QEMU does not start: {words[-500:]}")
        return self

    def command(self) -> list[str]:
        """Return the command line of QEMU."""
        if shutil.which(QEMU) is None:
            raise GuestError(f"{QEMU} is missing: apt-get install --no-install-recommends qemu-system-x86")
        options = self.options
        kernel = kernels.fetch(options.kernel)
        parameters = (
            f"console=ttyS0 quiet loglevel=4 panic=-1 guest.name={self.name} mitigations=off nokaslr "
            f"random.trust_cpu=on no_timer_check tsc=reliable cryptomgr.notests {options.parameters}"
        )
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in options.forwards)
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-machine", "pc,usb=off,vmport=off", "-accel", "tcg,thread=multi", "-cpu", "Westmere"]
        argv += ["-smp", str(options.cpus), "-m", f"{options.memory_mib}M"]
        argv += ["-kernel", str(kernel.image), "-initrd", str(kernels.initrd(kernel)), "-append", parameters]
        argv += ["-chardev", f"file,id=console,path={self.log}", "-serial", "chardev:console"]
        argv += ["-chardev", f"socket,id=agent,path={self._port},server=on,wait=off"]
        argv += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=tmem.guest"]
        argv += ["-device", "virtio-rng-pci"]
        argv += ["-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile="]
        root = f"file={image.build()},format=raw,snapshot=on"
        for number, drive in enumerate((root, *options.disks)):
            argv += ["-drive", f"{drive},if=none,id=disk{number}"]
            argv += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        return [*argv, *options.qemu]

    @property
    def _port(self) -> Path:
        return self.directory / "agent.sock"

    def _connected(self) -> bool:
        try:
            self.channel.connect(self._port)
        except OSError:
            return False
        return True
