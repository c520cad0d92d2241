"""Where kernels and images are kept, and how they are made once.

``$TMEM_GUEST_CACHE``, else /var/cache/tmem-guest if that can be written, else ~/.cache/tmem-guest. Everything
in it may be deleted while no guest is being started.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SYSTEM = Path("/var/cache/tmem-guest")
_KEPT = 6


class GuestError(Exception):
    """A guest, or something that one is made of, is not as it must be; the message says what to do."""


def directory() -> Path:
    """Return the cache directory; it exists."""
    named = os.environ.get("TMEM_GUEST_CACHE")
    if named:
        path = Path(named)
    elif os.access(_SYSTEM if _SYSTEM.exists() else _SYSTEM.parent, os.W_OK):
        path = _SYSTEM
    else:
        path = Path.home() / ".cache" / "tmem-guest"
    path.mkdir(parents=True, exist_ok=True)
    return path


def made(name: str, make: Callable[[Path], None]) -> Path:
    """Return what is called `name` in the cache, made by `make` if it is not there.

    `make` gets a path that does not exist yet, to put a file or a directory there; it appears under its name
    only when it is complete. Processes that want the same wait for the one that makes it. Of the names with
    the same beginning up to the last dash only the latest few are kept.
    """
    path = directory() / name
    with _locked(name):
        if path.exists():
            os.utime(path)  # lately used, so not swept
            return path
        partial = path.with_name(f"{name}.partial")
        _remove(partial)
        try:
            make(partial)
            partial.rename(path)
        finally:
            _remove(partial)
        _sweep(name)
    return path


def run(*argv: str | Path, cwd: Path | None = None, check: bool = True) -> str:
    """Run a tool of the host and return its output; `GuestError` with its last words if it fails."""
    try:
        result = subprocess.run(
            [str(argument) for argument in argv],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
    except FileNotFoundError:
        raise GuestError(f"{argv[0]} is not installed: scripts/test installs what guests need") from None
    if check and result.returncode != 0:
        raise GuestError(f"{' '.join(map(str, argv[:3]))} ... failed: {result.stderr.strip()[-500:]}")
    return result.stdout


@contextmanager
def _locked(name: str) -> Iterator[None]:
    # A lock for each kind, for a thing of one kind may need one of another.
    with (directory() / f".{name.rpartition('-')[0] or name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(name: str) -> None:
    """Remove old things of the kind of `name`; a guest that runs from one has it open and does not mind."""
    kind = name.rpartition("-")[0]
    if not kind:
        return
    found = sorted(directory().glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[_KEPT:]:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
