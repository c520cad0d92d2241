"""A swap device whose server the test starts and ends itself, with filters of nbdkit before it if wanted."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tmem.backends import _native
from tmem.backends.paths import SegmentPaths
from tmem.nbd import server
from tmem.nbd.export import Export

from .blocks import BlockLoad
from .board import Board, Child
from .ledger import Ledger


class Serving:
    """The server of one client, whose pool is made here.

    `filters` are names of nbdkit's filters, `parameters` what they are told; with filters nbdkit is started
    as the launcher would, without the check of its Python.
    """

    def __init__(
        self,
        paths: SegmentPaths,
        segment: _native.Segment,
        client: str,
        size_bytes: int,
        filters: Sequence[str] = (),
        parameters: Sequence[str] = (),
    ) -> None:
        self.export = Export(client, size_bytes, unix=str(paths.state / f"{client}.sock"))
        self._paths = paths
        self._filters, self._parameters = filters, parameters
        self._log = paths.directory / f"{client}.log"
        self._process: subprocess.Popen[bytes] | None = None
        segment.client(client).new_pool(persistent=True)
        self.export.save(paths)

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=server.environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        server.wait_ready(self.export)

    def _command(self) -> list[str]:
        if not self._filters:
            return server.command(self._paths, self.export.client)
        Path(self.export.unix or "").unlink(missing_ok=True)
        argv = server.arguments(self._paths, self.export)
        plugin = argv.index("python")
        return [
            *argv[:plugin],
            *(f"--filter={name}" for name in self._filters),
            *argv[plugin:],
            *self._parameters,
        ]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def said(self) -> str:
        """Return all that it has said."""
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def serving(made: Serving) -> Iterator[Serving]:
    """Start the server; it does not outlive the context."""
    try:
        made.start()
        yield made
    finally:
        made.kill()


@contextlib.contextmanager
def load(
    made: Serving, errors: Path, seed: str, expected: frozenset[int] = frozenset(), blocks: int | None = None
) -> Iterator[Child]:
    """Keep a load on the device, or its first `blocks` blocks; at the end all must be right."""
    ledger, board = Ledger(blocks or made.export.size_bytes // 4096), Board()
    child = Child(board, BlockLoad(made.export.uri, ledger, board, seed, expected=expected).run, errors)
    try:
        child.start()
        child.work()
        yield child
        child.end()
    finally:
        child.kill()
