"""Spill files that nobody will ever read again: their segment ended with an earlier boot, which left them.

Removed is only what is provably such a file: it has the name that a file in a directory is given, is a spill
file, was not written since this machine has started (a segment does not outlive that), belongs to no segment
that lives, and nobody holds it. Not for files with names of people's own: those are used again by whoever is
given the same path. Plain functions; any thread.
"""

import contextlib
import logging
import time
from collections.abc import Container
from pathlib import Path

from tmem.backends.tiers import spill
from tmem.errors import TierError

_log = logging.getLogger(__name__)


def started_s() -> float:
    """Return when this machine has started, in seconds of the clock as it is now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def remove(directory: Path, living: Container[int], before_s: float) -> list[Path]:
    """Remove the orphans in `directory`, and return them.

    `living` are the nonces of segments that live, `before_s` is when the machine has started.
    """
    found = []
    for path in sorted(directory.glob("tmem-*.spill")):
        with contextlib.suppress(OSError, TierError):  # what is in use, or none of ours, stays
            if path.stat().st_mtime < before_s and spill.identity_of(path).nonce not in living:
                spill.remove_unused(path)
                _log.info("%s was left by an earlier boot: removed", path)
                found.append(path)
    return found
