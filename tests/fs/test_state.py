"""What one overlay saves, another one restores: nothing that the kernel relies on is lost or made up."""

import gc
import os
import pickle
import socket
import struct
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyfuse3
import pytest
import trio

from tmem.backends.paths import SegmentPaths
from tmem.fs import state
from tmem.fs.device import Device
from tmem.fs.identity import Version
from tmem.fs.options import MountOptions
from tmem.fs.overlay import Overlay, build
from tmem.fs.plan import Plan, Successor
from tmem.fs.precache import Precache
from tmem.fs.state import SavedOverlay, SavedPool, State

if TYPE_CHECKING:
    from tmem.backends import _native

CONTEXT = pyfuse3.RequestContext()


def new(root: int) -> Overlay:
    return build(root, Precache(SegmentPaths.of("default"), "web"), fine_stamps=True)


async def use(overlay: Overlay, directory: Path) -> int:
    """Leave something of every kind behind in the overlay; a file handle."""
    for name in ("read", "appended", "unlinked", "forgotten", "looked up"):
        (directory / name).write_bytes(name.encode() * 1000)
    (directory / "directory").mkdir()
    numbers = {}
    for name in ("read", "appended", "unlinked", "forgotten", "looked up", "looked up", "directory"):
        numbers[name] = (await overlay.lookup(pyfuse3.ROOT_INODE, name.encode(), CONTEXT)).st_ino
    await overlay.opendir(numbers["directory"], CONTEXT)
    closed = (await overlay.open(numbers["forgotten"], os.O_RDONLY, CONTEXT)).fh
    reading = (await overlay.open(numbers["read"], os.O_RDONLY, CONTEXT)).fh
    await overlay.open(numbers["appended"], os.O_WRONLY | os.O_APPEND, CONTEXT)
    await overlay.open(numbers["unlinked"], os.O_RDWR, CONTEXT)
    await overlay.unlink(pyfuse3.ROOT_INODE, b"unlinked", CONTEXT)
    for handle in (reading, closed):
        await overlay.read(handle, 0, 1000)
    await overlay.release(closed)
    await overlay.forget([(numbers["forgotten"], 1)])
    return reading


def through_a_file(saved: SavedOverlay) -> SavedOverlay:
    descriptor = state.dump(cast(State, {"overlay": saved}))
    try:
        return state.load(descriptor)["overlay"]
    finally:
        os.close(descriptor)


def test_an_overlay_is_restored_as_it_was(tmp_path: Path, segment: "_native.Segment") -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    overlay = new(root)
    overlay.precache.claim()
    reading = trio.run(use, overlay, tmp_path)
    saved = overlay.saved()
    assert [row[5] for row in saved["inodes"]["nodes"]].count(2) == 1  # looked up twice
    assert len(saved["remembered"]) == 1
    assert len(saved["files"]) == 3
    assert saved["next_file"] > reading
    again = new(root)
    again.precache.restore(through_a_file(saved)["pool"])
    again.restore(through_a_file(saved))
    again.precache.claim()
    try:
        assert again.saved() == saved
        assert bytes(trio.run(again.read, reading, 0, 1000)) == (b"read" * 250)
        assert again.statistics().hit_reads == 1
    finally:
        again.close()
    assert segment.check() == []


def test_what_could_not_be_written_stays_out_of_the_pool(tmp_path: Path, segment: "_native.Segment") -> None:
    overlay = new(os.open(tmp_path, os.O_RDONLY))
    overlay.precache.claim()
    reading = trio.run(use, overlay, tmp_path)
    (named,) = (inode for inode in overlay.used_by_files() if inode.state and inode.state.reach)
    assert named.state is not None
    overlay.coherence.distrust(named.state)
    again = new(os.open(tmp_path, os.O_RDONLY))
    again.restore(through_a_file(overlay.saved()))
    again.precache.restore(overlay.precache.saved())
    again.precache.claim()
    try:
        for _ in range(2):
            assert bytes(trio.run(again.read, reading, 0, 1000)) == b"read" * 250
        assert again.statistics().put_pages == overlay.statistics().put_pages
        assert again.saved()["distrusted"] == [named.state.name]
    finally:
        again.close()


def test_a_state_of_before_names_none_of_these() -> None:
    content: dict[str, object] = {"overlay": {}}
    with tempfile.TemporaryFile() as file:
        file.write(struct.pack("<8sI4x", b"tmemfuse", 4) + pickle.dumps(content))
        file.flush()
        assert state.load(file.fileno())["overlay"]["distrusted"] == []


def test_an_abandoned_device_keeps_its_numbers() -> None:
    """What threads write to them meanwhile goes nowhere, never to a file that is opened then."""
    kernel, fuse = socket.socketpair()
    ours, theirs = socket.socketpair()
    device = Device(fuse.detach(), theirs.detach(), ours)
    numbers = (device.descriptor, device.session, ours.fileno())
    with kernel:
        device.abandon()
        assert kernel.recv(1) == b""  # it is over
        opened = os.open("/proc/self/status", os.O_RDONLY)
        assert opened not in numbers
        os.close(opened)
        for number in numbers:
            assert os.write(number, b"reply") == 5
            assert os.read(number, 1) == b""
    device.close()


def test_a_version_that_is_being_changed_is_not_handed_over(
    tmp_path: Path, segment: "_native.Segment"
) -> None:
    overlay = new(os.open(tmp_path, os.O_RDONLY))
    try:
        trio.run(use, overlay, tmp_path)
        inode = next(inode for inode in overlay.used_by_files() if inode.state and inode.state.version)
        assert inode.state is not None
        assert inode.state.saved()[4] == tuple(cast(Version, inode.state.version))
        inode.state.changes = 1
        assert inode.state.saved()[4] is None
    finally:
        overlay.close()


def test_a_plan_is_restored_as_it_was(tmp_path: Path) -> None:
    options = f"client=x,shared={uuid.uuid4()},cache=kernel,loop=plain,timeout=2.5,allow_other,ro,nofail"
    parsed = MountOptions.parse([options], "/mnt")
    plan = Plan("/lower", "/mnt", parsed, SegmentPaths("s", tmp_path), True, Successor(("a", "b"), 3.0))
    assert Plan.restored(plan.saved()) == plan
    plain = replace(plan, options=MountOptions.parse([], "/mnt"), detached=False, successor=Successor())
    assert Plan.restored(plain.saved()) == plain
    # Compared apart: they do not count in comparisons.
    assert Plan.restored(plan.saved()).options.ignored == plan.options.ignored


def test_every_descriptor_is_named(tmp_path: Path, segment: "_native.Segment") -> None:
    """What exec must keep open is what the overlay has open, and nothing else of the process."""
    gc.collect()  # what other tests have left must not be closed meanwhile
    before = open_descriptors()
    overlay = new(os.open(tmp_path, os.O_RDONLY))
    overlay.precache.claim()
    trio.run(use, overlay, tmp_path)
    saved = cast(State, {"overlay": overlay.saved(), "device": {"descriptor": 0}})
    named = list(state.descriptors(saved))[1:]
    assert len(named) == len(set(named))
    others = open_descriptors() - before - set(named)
    assert set(named) <= open_descriptors() - before
    # The native core has one of its own, and opens it again.
    assert [os.readlink(f"/proc/self/fd/{other}") for other in others] == [segment.path]  # noqa: PTH115
    overlay.close()
    assert not any(_is_open(descriptor) for descriptor in named)


def open_descriptors() -> set[int]:
    return {descriptor for descriptor in range(1000) if _is_open(descriptor)}


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_the_number_of_the_format_stands_in_front() -> None:
    descriptor = state.dump(cast(State, {}))
    try:
        assert struct.unpack("<8sI", os.pread(descriptor, 12, 0)) == (b"tmemfuse", state.FORMAT)
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("field", ["segment", "client", "pool"])
def test_a_pool_that_is_not_the_same_is_not_used(
    tmp_path: Path, segment: "_native.Segment", field: str
) -> None:
    precache = Precache(SegmentPaths.of("default"), "web")
    precache.claim()
    saved = precache.saved()
    wrong = cast(SavedPool, {**saved, field: (1, 1) if field == "segment" else 77})
    again = Precache(SegmentPaths.of("default"), "web")
    again.restore(wrong)
    again.claim()
    used = again.saved()
    assert used["segment"] == saved["segment"]
    assert [pool.id for pool in segment.client("web").pools()] == [used["pool"]]
    again.close()
