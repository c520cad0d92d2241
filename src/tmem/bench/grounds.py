"""What measurements stand on: places, processes, control groups, each gone after its block in any case.

Everything runs in a session of its own: a Ctrl-C at the terminal reaches the command alone, which takes down
in order what it has set up. A server that died of it first would take swapped pages along. One thread, but
for the reader of statistics of a group.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tmem.backends import cgroup
from tmem.errors import TmemError
from tmem.nbd import swap

SHARED_MEMORY = Path("/dev/shm")
DISK = Path("/var/tmp")
"""Where files are made that must not be in memory."""

FIRST = 32767
"""The highest priority of a swap area; areas of one priority share the pages."""

_END_S = 30.0
_READ_INTERVAL_S = 0.02
_RETRY_S = 5.0


@contextmanager
def workplace(below: Path = SHARED_MEMORY) -> Iterator[Path]:
    """Yield a private directory, removed afterwards; on tmpfs unless told otherwise."""
    with tempfile.TemporaryDirectory(prefix="tmem-bench.", dir=below) as name:
        yield Path(name)


def go_before_others(pid: int) -> None:
    """Have the session of a process weigh among others what our own niceness says.

    To the scheduler each session is a group (autogroup), and niceness counts only within it: a
    daemon in a session of its own would share with all others like anybody.
    """
    with suppress(OSError):  # a kernel without, or not root
        Path(f"/proc/{pid}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))


@contextmanager
def running(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cpus: Iterable[int] | None = None,
    output: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, on `cpus` if given, while the block lasts; it is ended, and killed if need be.

    What it prints goes to the file `output`, or nowhere.
    """
    prefix = [] if cpus is None else ["taskset", "-c", ",".join(map(str, cpus))]
    with ExitStack() as stack:
        out = subprocess.DEVNULL if output is None else stack.enter_context(output.open("ab"))
        process = subprocess.Popen(
            [*prefix, *argv],
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            go_before_others(process.pid)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=_END_S)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll `condition` until it holds; RuntimeError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come about within {timeout_s:.0f} s")
        time.sleep(0.02)


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], what: str) -> None:
    """Wait until a server listens at `path`; RuntimeError at once if its process has ended instead."""

    def there() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with status {process.returncode}")
        return path.exists()

    wait_until(there, what)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """Make a memory control group (v1 or v2); yield its directory. Whoever is in it has ended before.

    Its statistics are read all the while: where nobody does, the kernel's reclaim takes numbers of two
    seconds ago for the sizes of its lists and now and then kills the program in the group although swap has
    room (20 of 20 runs of a program made for it, on zram as well; none while they are read).
    """
    mounted, version = cgroup.mount_point(), cgroup.version()
    if mounted is None or version is None:
        raise TmemError("there is no memory control group here: boot with cgroup_enable=memory")
    path = Path(tempfile.mkdtemp(prefix="tmem-bench-", dir=mounted))
    done = threading.Event()

    def read() -> None:
        while not done.wait(_READ_INTERVAL_S):
            cgroup.statistics(path)

    reader = threading.Thread(target=read, daemon=True)
    try:
        limit = path / cgroup.LIMIT_FILES[version]
        if not limit.exists():
            raise TmemError(
                "the memory controller is not enabled for new control groups: "
                f"echo +memory >{mounted}/cgroup.subtree_control"
            )
        limit.write_text(str(limit_bytes))
        reader.start()
        yield path
    finally:
        done.set()
        if reader.ident is not None:
            reader.join()

        def gone() -> bool:
            try:
                path.rmdir()
            except OSError:
                return False
            return True

        wait_until(gone, f"the end of {path}")


@contextmanager
def swapping_to(device: str) -> Iterator[None]:
    """Swap to `device`, before all other swap, while the block lasts.

    Does not return before the kernel has taken its pages back: whoever ended a device before that would lose
    pages of running programs. Killed meanwhile, we leave the device working.
    """
    try:
        swap.on(device, priority=FIRST)
        yield
    finally:
        while swap.is_active(device):
            try:
                swap.off(device)
            except TmemError as error:
                print(f"tmem: {error}; trying 'swapoff {device}' until it is done", file=sys.stderr)
                time.sleep(_RETRY_S)
