"""The command ``restart``: what is left to do after an upgrade of the package.

Programs that run go on with the code that they have loaded. This replaces them one by one, while the swap
devices and the mounts of the segment stay in use. Nothing is replaced before the new code has shown, in a
process of its own, that it can use this segment.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import click

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.cli.configured import configuration
from tmem.cli.context import segment_name
from tmem.errors import ServiceError, TmemError

TIMEOUT_S = 30.0
Step = Callable[[], None]


@click.command()
@click.option("--force", is_flag=True, help="Also servers whose clients must connect again by themselves.")
@click.option("--manager", "only_manager", is_flag=True, help="Only the manager: it reads the configuration.")
@click.pass_context
def restart(ctx: click.Context, force: bool, only_manager: bool) -> int:
    """Go on with the version of tmem that is installed now, in every process of the segment.

    The manager, the servers of swap devices and the daemons of mounts are replaced one by one, while all of
    them are in use. A device that is attached here by the kernel's nbd driver has two servers, and stands
    still for the moment that it takes to lead the kernel from one to the other. A server of other machines is
    left alone while somebody is connected to it: say --force if they connect again by themselves.
    """
    if only_manager:
        configuration(ctx)  # nobody reads one that is wrong
    paths = SegmentPaths.of(segment_name(ctx))
    _try_out(paths)
    _restart_manager(paths)
    click.echo(f"manager of segment {paths.name!r}: another one")
    if only_manager:
        return 0
    failed = False
    for step in (*_devices(paths, force), *_mounts(paths)):
        try:
            step()
        except TmemError as error:  # the others are none the worse
            click.echo(f"tmem: {error}", err=True)
            failed = True
    return int(failed)


def _try_out(paths: SegmentPaths) -> None:
    """Let the installed code look at the segment; `ServiceError` if it cannot."""
    argv = [sys.executable, "-P", "-m", "tmem", "--name", paths.name, "list", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("tmem: ") or f"status {done.returncode}"
        raise ServiceError(f"nothing was restarted, for what is installed cannot use the segment: {said}")


def _restart_manager(paths: SegmentPaths) -> None:
    _, before = service.ping(paths)
    service.request(paths, {"op": "renew"})
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(ServiceError):
            if service.ping(paths)[1].get("since_ns") != before.get("since_ns"):
                return
        time.sleep(0.02)
    raise ServiceError(
        f"the manager does not answer: 'tmem --name {paths.name} start -d'; its servers and mounts go on"
    )


def _devices(paths: SegmentPaths, force: bool) -> Iterator[Step]:
    from tmem.nbd import export, renew

    for device in export.load_all(paths):
        yield partial(renew.renew, paths, device.client, force, click.echo)


def _mounts(paths: SegmentPaths) -> Iterator[Step]:
    from tmem.fs import mounts

    def restart_mount(mountpoint: str) -> None:
        pause_ms = mounts.restart(mountpoint).pause_ns / 1e6
        click.echo(f"{mountpoint}: restarted, requests waited {pause_ms:.0f} ms")

    for record in sorted(paths.state.glob("mount-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            mountpoint = json.loads(record.read_text(encoding="utf-8"))["mountpoint"]
            if os.path.ismount(mountpoint):
                yield partial(restart_mount, mountpoint)
