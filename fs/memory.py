"""Keep the daemon's memory in RAM: a daemon that waits for a page of its own may wait for itself.

If the machine swaps to the segment that the daemon uses too, and the daemon's stack is swapped out while it
holds one of the segment's short locks, then the server that must bring the page back waits for that lock.
Whether the machine does so changes while the mount is there, so memory is locked always, where that is
permitted: by root. What is mapped when serving begins and has any content is faulted in, once: files (the
program, its libraries), and what was swapped out by then. Where nothing was written yet, and what is mapped
later (a segment that appears, stacks, buffers), is locked page by page as it is used: that is nowhere to be
brought back from, and a segment would be filled with zero pages just because it was mapped.

Measured at the start (Python 3.11, kernel 6.18): 22 MiB of its own, most of them Python's objects; 28 if what
is empty is faulted in as well: stacks, and what Python's allocator has not given out yet. Beside that there
are 17 MiB of files, which mounts share. 120 MB more would be the stacks of later threads, were these faulted
in. It takes 50 ms. Threading: `small_stacks` before the first thread; `lock` in the event loop's thread,
which is the only one that maps segments.
"""

import logging
import os
import threading
from pathlib import Path

from tmem.backends.guarded import STACK_BYTES
from tmem.backends.locking import lock_process, swappable

log = logging.getLogger(__name__)


def small_stacks() -> None:
    """Have threads made with stacks as small as those of the other processes whose memory is locked."""
    threading.stack_size(STACK_BYTES)


def lock(segment: Path) -> bool:
    """Lock this process' memory, and the pages of `segment` where they could be swapped; False if it may not.

    Without a segment the rest is locked.
    """
    if os.geteuid() != 0:
        return False
    try:
        present = segment if segment.exists() else None
        report = lock_process(
            present,
            present is not None and swappable(segment),
            future_on_fault=True,
            anonymous_on_fault=True,
        )
    except OSError as error:  # it went in between
        log.warning("memory is not locked: %s", error)
        return False
    if report.refused:
        log.warning("memory is not locked: %s", report.refused[0])
        return False
    return True
