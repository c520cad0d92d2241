"""Replace the code of a mount's daemon while files are open: the side of the code that comes (see `restart`).

``python -m tmem.fs.takeover --check FD MOUNTPOINT`` runs as a child of the old code: it rebuilds
everything from the state in the memory file FD, touching no descriptor of the mount but the root's, and
ends with status 0, or with the reason as the last line on stderr. Without ``--check`` it is the daemon,
after exec; the mount point is there for whoever lists processes. Not for new mounts: `mount`.
"""

import contextlib
import logging
import os
import sys

import trio

from tmem.errors import AttachError, TmemError
from tmem.fs import device, mounts, state
from tmem.fs.mount import log_to_syslog
from tmem.fs.plan import Plan
from tmem.fs.serving import Server
from tmem.fs.state import State

log = logging.getLogger(__name__)


def check(saved: State) -> None:
    """Show that this code can take the mount over. TmemError says why it cannot."""
    server = _rebuild(saved)
    server.precache.restore(saved["overlay"]["pool"])
    tried = device.taken_over(-1, saved["device"]["request"], saved["device"]["reply"])
    server.attach(tried)
    if not server.can_restart:
        raise AttachError("its pyfuse3 differs from what a restart needs: unmount and mount again")
    trio.run(device.agree_as_before, tried)


def take_over(saved: State) -> None:
    """Serve the mount until it is unmounted."""
    for descriptor in state.descriptors(saved):
        os.set_inheritable(descriptor, False)
    plan = Plan.restored(saved["plan"])
    if plan.detached:
        log_to_syslog()
    mounted = device.taken_over(**saved["device"])
    try:
        server = _rebuild(saved)
        with contextlib.suppress(TmemError, OSError):  # else a new pool begins once the segment can be used
            server.precache.restore(saved["overlay"]["pool"])
        server.run(lambda: mounted, saved["restarts"])
    except Exception:
        log.exception("the mount on %s failed after its restart", plan.mountpoint)
        raise
    finally:
        mounted.close()
        mounts.sweep(plan.mountpoint)


def _rebuild(saved: State) -> Server:
    """Return the server of the mount as it was, but for the pool."""
    overlay = saved["overlay"]
    server = Server(Plan.restored(saved["plan"]), overlay["inodes"]["root"], overlay["fine_stamps"])
    server.overlay.restore(overlay)
    return server


def main(arguments: list[str]) -> int:
    """Be the command."""
    *options, descriptor, _mountpoint = arguments
    try:
        saved = state.load(int(descriptor))
        os.close(int(descriptor))
        (check if options == ["--check"] else take_over)(saved)
    except TmemError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
