"""The launcher: from an export's record to a running nbdkit.

``python -m tmem.nbd.server DIRECTORY NAME CLIENT [standby]`` reads the record, sets what must be set before
the first thread exists, and becomes nbdkit in the foreground. The manager runs exactly this, and again
whenever it dies, so it must need nothing but the record. ``tmem swap serve`` ends here too.

A device that is attached here has two servers, the second on a socket of its own: all that they know is in
the segment, so either may serve at any moment, and when one dies the other is there, warm.

Not for supervision (`tmem.backends.manager`). Single-threaded until the exec.
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn, get_args

from tmem.backends import groups, guarded
from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import AttachError, TmemError
from tmem.nbd import handshake
from tmem.nbd.export import Export, load

THREADS = 4
MODEL = "serialize-requests"
"""nbdkit's worker threads per connection, and its thread model: serialized, it uses one thread of them.

Medians of seven to fifteen rounds on two quiet CPUs, parallel and serialized, in IOPS of nbdkit's memory
plugin: 4 KiB reads at depth 32 0.83-0.89 and 0.98 (parallel threads wait for the interpreter's lock), at
depth 1 0.96 and 0.93, 4 KiB writes at depth 1 1.00 and 0.91, at depth 32 0.97 and 1.09; 128 KiB writes 2.4
and 2.5 times the plugin with zstd. A swapping hog touches as many pages either way. Connections work side by
side in both: where many CPUs swap out at once, use several.
"""

PLUGIN = Path(__file__).with_name("plugin.py")

Role = Literal["swap", "standby"]
"""Which of a device's servers: the first, or the second. Its service and its files are called ROLE-CLIENT."""


def report_path(paths: SegmentPaths, client: str, role: Role = "swap") -> Path:
    """Return the file in which a running server says who it is and what it could lock."""
    return paths.state / f"{role}-{client}.server"


def as_served(paths: SegmentPaths, export: Export, role: Role) -> Export:
    """Return `export` with the address at which that server of it listens."""
    if role == "swap":
        return export
    socket = str(paths.state / f"{role}-{export.client}.sock")
    return replace(export, unix=socket, tcp=None, tls_psk=None, tls_user=None)


def arguments(
    paths: SegmentPaths, export: Export, threads: int = THREADS, model: str = MODEL, role: Role = "swap"
) -> list[str]:
    """Return the command line of nbdkit for `export`.

    `threads` workers per connection and the thread model are parameters for measurement only.
    """
    export = as_served(paths, export, role)
    argv = [find_nbdkit(), "-f", "-t", str(threads)]
    if export.tcp is None:
        argv += ["-U", str(export.unix)]
    else:
        host, port = export.tcp
        argv += ["-i", host, "-p", str(port)]
    if export.tls_psk is not None:
        argv += ["--tls=require", f"--tls-psk={export.tls_psk}"]
    return [
        *argv,
        "python",
        str(PLUGIN),
        f"segment={paths.segment}",
        f"client={export.client}",
        f"size={export.size_bytes}",
        f"report={report_path(paths, export.client, role)}",
        f"model={model}",
    ]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with what nbdkit's embedded Python and malloc need.

    The embedded interpreter takes the first python3 on PATH for its own and finds the packages beside it.
    """
    bin_dir = str(Path(sys.executable).parent)
    return {**base, **guarded.MALLOC_ENVIRONMENT, "PATH": f"{bin_dir}:{base.get('PATH', os.defpath)}"}


def find_nbdkit() -> str:
    """Return the path of nbdkit; AttachError if it is not installed."""
    found = shutil.which("nbdkit")
    if found is None:
        raise AttachError("nbdkit is not installed: apt-get install nbdkit nbdkit-plugin-python")
    return found


def check_python(dump: str | None = None) -> None:
    """Check that nbdkit embeds the minor version of Python that runs this, or the packages would not fit.

    `dump` is what ``nbdkit python --dump-plugin`` prints; AttachError if it is another Python, or no plugin.
    """
    if dump is None:
        result = subprocess.run(
            [find_nbdkit(), "python", "--dump-plugin"],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if result.returncode != 0:
            raise AttachError("nbdkit has no Python plugin: apt-get install nbdkit-plugin-python")
        dump = result.stdout
    values = dict(line.split("=", 1) for line in dump.splitlines() if "=" in line)
    embedded = ".".join(values.get("python_version", "unknown").split(".")[:2])
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if embedded != own:
        raise AttachError(
            f"nbdkit embeds Python {embedded} but tmem is installed under Python {own}: "
            f"make its virtual environment from python{embedded} (Debian's own is /usr/bin/python3)"
        )


def command(paths: SegmentPaths, client: str, role: Role = "swap") -> list[str]:
    """Return the command that serves `client` in the foreground, for the manager and for service files."""
    words = [sys.executable, "-m", "tmem.nbd.server", str(paths.directory), paths.name, client]
    return words if role == "swap" else [*words, role]


def serve(paths: SegmentPaths, export: Export, role: Role = "swap") -> NoReturn:
    """Become the server of `export`. Raises `TmemError` if it cannot be started."""
    check_python()
    if running(paths, export.client, role) is not None:
        raise AttachError(
            f"the server of {export.client} runs already: stop it first, or leave it to the manager"
        )
    _check_client(paths, export.client)
    if (place := as_served(paths, export, role).unix) is not None:
        # A killed server leaves its socket, and nbdkit does not bind to a name that exists.
        if Path(place).exists() and not Path(place).is_socket():
            raise AttachError(f"{place} is there, and no socket: move it away")
        Path(place).unlink(missing_ok=True)
    if export.tls_psk is not None and not os.access(export.tls_psk, os.R_OK):
        raise AttachError(f"the file of pre-shared keys {export.tls_psk} cannot be read: see --tls-psk")
    argv = arguments(paths, export, role=role)
    os.umask(0o077)
    os.chdir("/")
    groups.enter()  # of a server that the manager did not start
    guarded.set_guards(export.realtime)
    os.execve(argv[0], argv, environment(os.environ))


def _check_client(paths: SegmentPaths, client: str) -> None:
    """Refuse to serve a client that is gone or has departed: its new place may listen at this address."""
    from tmem.backends import _native

    store = _native.attach(str(paths.segment))
    try:
        if store.client(client, create=False).phase == "departed":
            raise AttachError(
                f"{client} has been handed over: serve it at its new place, or, if that has failed, take it "
                f"back with 'tmem --name {paths.name} thaw --force {client}'"
            )
    finally:
        store.close()


def check_socket(path: Path) -> None:
    """Raise `AttachError` if a server cannot make its socket there: nothing but a dead one may be in its way.

    Whoever names a file by mistake must not lose it, and who listens there must not lose their clients.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise AttachError(
                f"there is no directory {path.parent} for the socket: make it, or give another --unix"
            ) from None
        return
    except OSError as error:
        raise AttachError(f"{path} cannot be a socket ({error.strerror}): give another --unix") from None
    if not stat.S_ISSOCK(status.st_mode):
        raise AttachError(f"{path} is there, and no socket: give another --unix")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError:
            pass  # somebody who is too busy, or whom we may not speak to
    raise AttachError(f"another program listens on {path}: end it, or give another --unix")


def running(paths: SegmentPaths, client: str, role: Role = "swap") -> Process | None:
    """Return the server process of `client`, None if none runs."""
    report = read_report(paths, client, role)
    if report is None:
        return None
    pid, start_ticks = report.get("pid"), report.get("start_ticks")
    if not isinstance(pid, int) or not isinstance(start_ticks, int):
        return None
    process = Process(pid, start_ticks)
    return process if process.alive else None


def connections(paths: SegmentPaths, export: Export) -> int:
    """Return how many clients are connected to the server of `export`."""
    import psutil  # not above: a server that is started again under pressure must not wait for it

    process = running(paths, export.client)
    if process is None:
        return 0
    try:
        sockets = psutil.Process(process.pid).net_connections("all")
    except psutil.NoSuchProcess:
        return 0
    if export.tcp is not None:
        return sum(found.status == psutil.CONN_ESTABLISHED for found in sockets)
    # Of a unix socket the listening end and each accepted one carry the same path.
    return max(0, sum(str(found.laddr) == export.unix for found in sockets) - 1)


def read_report(paths: SegmentPaths, client: str, role: Role = "swap") -> dict[str, object] | None:
    """Return what the last server of `client` said of itself, None if it said nothing."""
    try:
        document = json.loads(report_path(paths, client, role).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def wait_ready(export: Export, timeout_s: float = 15.0) -> handshake.ExportInfo | None:
    """Wait until the server of `export` answers a handshake with the right size; what it says (None over
    TLS).

    Raises `AttachError` after `timeout_s` seconds, with the last reason.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        reason: Exception
        try:
            info = handshake.probe(export)
        except (OSError, AttachError) as error:
            reason = error
        else:
            if info is None or info.size_bytes == export.size_bytes:
                return info
            reason = AttachError(f"it serves {info.size_bytes} bytes instead of {export.size_bytes}")
        if time.monotonic() > deadline:
            raise AttachError(f"no NBD server answers at {export.uri} ({reason})")
        time.sleep(0.02)


def _main(argv: list[str]) -> None:
    if len(argv) not in (3, 4) or argv[3:] not in ([], *([role] for role in get_args(Role))):
        raise SystemExit("usage: python -m tmem.nbd.server DIRECTORY NAME CLIENT [standby]")
    directory, name, client = argv[:3]
    paths = SegmentPaths(name, Path(directory))
    try:
        serve(paths, load(paths, client), "standby" if argv[3:] == ["standby"] else "swap")
    except (TmemError, OSError) as error:
        raise SystemExit(f"tmem: {error}") from None


if __name__ == "__main__":
    _main(sys.argv[1:])
