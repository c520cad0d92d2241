"""The host of guests: a segment of its own, with a manager, swap devices for guests, and ephemeral clients.

What it starts it ends, by process id; nothing of another segment is touched.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

from .cache import GuestError

if TYPE_CHECKING:
    from tmem.backends import _native

PAGE = 4096


class Host:
    """A segment in a run-time directory of its own, used by the command line as people use it.

    A context manager. `directory` is on a tmpfs, of mode 0700, and gone afterwards.
    """

    def __init__(self, memory: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tmem-guest-host-", dir="/dev/shm"))
        self.memory = memory
        self._fillers: list[Filler] = []
        self._added: list[str] = []
        self._open: list[_native.Segment] = []

    def __enter__(self) -> Self:
        try:
            self.tmem("start", "-d", "--memory", self.memory)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def tmem(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run the command line and return its output; `GuestError` with what it says if it fails."""
        # A file, not a pipe: the manager that it starts would keep the pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [sys.executable, "-m", "tmem", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                timeout=timeout_s,
                check=False,
            )
            output.seek(0)
            text = output.read()
        if done.returncode != 0:
            raise GuestError(f"tmem {' '.join(arguments)} failed: {text.strip()}")
        return text

    def serve(self, client: str, size: str, *options: str) -> str:
        """Make a swap device for a guest; its URI."""
        self._added.append(client)
        return self.tmem("swap", "add", client, "--size", size, *options).splitlines()[-1]

    def serve_tcp(self, client: str, size: str, *options: str) -> int:
        """Make a swap device that is served over TCP; its port of 127.0.0.1."""
        port = free_port()
        self.serve(client, size, "--tcp", f"127.0.0.1:{port}", *options)
        return port

    def keys(self, user: str) -> Path:
        """Make a pre-shared key for `user`, in a directory of its own as QEMU wants it; the file."""
        directory = self.directory / f"keys-{user}"
        directory.mkdir(mode=0o700)
        file = directory / "keys.psk"
        file.touch(mode=0o600)
        file.write_text(f"{user}:{secrets.token_hex(32)}\n")
        return file

    def statistics(self, client: str | None = None) -> dict[str, Any]:
        """Return what ``list --json`` says of the segment, or of one client."""
        document: dict[str, Any] = json.loads(self.tmem("list", "--json"))
        if client is None:
            return document
        (found,) = (one for one in document["clients"] if one["name"] == client)
        return dict(found)

    def pool(self, client: str) -> dict[str, Any]:
        """Return the statistics of a client's first pool."""
        return dict(self.statistics(client)["pools"][0])

    def counter(self, client: str) -> Callable[[], int]:
        """Return what counts the pages of a client's first pool, for whoever asks often."""
        from tmem.backends import _native

        store = _native.attach(str(self.directory / "default"))
        self._open.append(store)

        def pages() -> int:
            return store.client(client, create=False).pools()[0].statistics()["pages"]

        return pages

    def fill(self, client: str, weight: int) -> "Filler":
        """Make a client that keeps putting ephemeral pages, as a precache under load does."""
        filler = Filler(self.directory / "default", client, weight)
        self._fillers.append(filler)
        return filler

    def servers(self, client: str) -> list[psutil.Process]:
        """Return the processes that serve a client."""
        return [process for process in self._processes() if f"client={client}" in _arguments(process)]

    def kill_servers(self, client: str) -> int:
        """SIGKILL whoever serves a client; how many there were."""
        found = self.servers(client)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return len(found)

    def close(self) -> None:
        """Take everything down: as people do, and what is left by process id."""
        for filler in self._fillers:
            filler.close()
        for store in self._open:
            store.close()
        for arguments in (*(("swap", "remove", client) for client in self._added), ("destroy", "--all")):
            with suppress(GuestError, subprocess.TimeoutExpired):
                self.tmem(*arguments, timeout_s=20)
        left = self._processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TMEM_RUNTIME_DIR": str(self.directory)}

    def _processes(self) -> list[psutil.Process]:
        """Return the processes that were started with this run-time directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMEM_RUNTIME_DIR") == str(self.directory):
                    found.append(process)
        return found


class Filler:
    """A client with an ephemeral pool into which a thread puts thousands of pages a second until closed."""

    def __init__(self, segment: Path, name: str, weight: int) -> None:
        from tmem.backends import _native

        self.name = name
        self._store = _native.attach(str(segment))
        client = self._store.client(name)
        client.hold()
        client.weight = weight
        self._client = client
        self._pool = client.new_pool(persistent=False, exclusive=False)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._put, name=f"filler {name}", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """The memory that its pages have now."""
        return self._client.statistics()["ephemeral_bytes"]

    def close(self) -> None:
        """Stop; its pages stay until the segment goes."""
        self._over.set()
        self._thread.join(10)
        self._store.close()

    def _put(self) -> None:
        object_id = bytes(24)
        index = 0
        noise = secrets.token_bytes(PAGE)
        # In portions, so that this does not take a CPU from the guests.
        while not self._over.wait(0.02):
            for _ in range(100):
                page = index.to_bytes(8, "little") + noise[index % 1024 :][:1592] + bytes(2496)
                self._pool.put(object_id, index, page)
                index += 1


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []
