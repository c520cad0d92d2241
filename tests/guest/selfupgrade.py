"""An upgrade in a guest that swaps to itself: the package is replaced, then every process of ours."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

from .machine import Command, Guest, GuestError

VERSION = "99.0"

# As pip does it: new files under the old names, while the old ones are still mapped.
_REPLACE = f"""
set -e
cd /usr/local/lib/python3.11/dist-packages
cp -a tmem tmem.new
sed -i 's/^__version__.*/__version__ = "{VERSION}"/' tmem.new/__init__.py
rm -f tmem.new/__pycache__/__init__.*
sed -i 's/^Version: .*/Version: {VERSION}/' tmem-*.dist-info/METADATA
mv tmem tmem.old
mv tmem.new tmem
rm -r tmem.old
tmem --version
"""
# The native core of the replaced package is still mapped by those that have not been restarted.
_OLD = "grep -l 'tmem.*_native.*(deleted)' /proc/[0-9]*/maps 2>/dev/null | cut -d/ -f3; true"


def upgrade(guest: Guest, reader: Command, pids: Callable[[], dict[str, int]]) -> dict[str, Any]:
    """Replace the package and restart everything; the figures of the pause. `GuestError` if it fails.

    `reader` is a guest-tool reader at work on the mount; `pids` tells the processes of ours.
    """
    before = pids()
    said = guest.run(_REPLACE, 120).stdout
    if VERSION not in said:
        raise GuestError(f"the package was not replaced: {said}")
    old = guest.run(_OLD).stdout.split()
    told = len(reader.stdout.splitlines())
    probe = guest.start(["guest-tool", "strike", "-d", "/dev/nbd0", "-t", "600"])
    began = time.monotonic()
    result = guest.run(["tmem", "restart"], 300, check=False)
    took_s = round(time.monotonic() - began, 1)
    time.sleep(2)  # the reader tells of a second when it is over
    probe.signal(15)
    measured = json.loads(probe.wait(60).stdout.splitlines()[-1])
    waits = re.findall(r"slowest ([\d.]+)", "\n".join(reader.stdout.splitlines()[told:]))
    figures = {
        "restart_s": took_s,
        "said": (result.stdout + result.stderr).splitlines(),
        "slowest_device_read_ms": measured["slowest_probe_ms"],
        "failed_device_reads": measured["failed_probes"],
        "hog_still_ms": measured["hog_still_ms"],
        "slowest_file_read_ms": max(map(float, waits), default=None),
        "pids_before": before,
        "pids_after": pids(),
        "of_old_code_before": old,
        "of_old_code_after": guest.run(_OLD).stdout.split(),
    }
    if result.rc != 0 or figures["of_old_code_after"]:
        raise GuestError(f"tmem restart ended with {result.rc}: {figures}")
    return figures
