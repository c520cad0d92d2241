"""A device moves to another segment under a client that writes and verifies: no block is lost or old."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest

from tmem.backends import handoff
from tmem.backends.paths import SegmentPaths
from tmem.errors import HandoffError
from tmem.nbd.export import Attachment, Export

from ..waiting import DEADLINE_S
from .conftest import Server, eventually
from .witness import Witness

if TYPE_CHECKING:
    from tmem.backends import _native

BLOCKS = 1500


@pytest.fixture
def other(runtime_dir: Path) -> Iterator["_native.Segment"]:
    """A second segment, called ``other``."""
    from tmem.backends import _native

    (runtime_dir / "other.d").mkdir(mode=0o700)
    made = _native.create(str(runtime_dir / "other"), 64 << 20)
    yield made
    made.close()


def names(segment: "_native.Segment") -> list[str]:
    return [client.name for client in segment.clients()]


def test_a_client_of_a_device_does_not_notice(
    make_server: Callable[..., Server],
    segment: "_native.Segment",
    other: "_native.Segment",
    runtime_dir: Path,
    tmp_path: Path,
) -> None:
    """Back and forth, a new server on the same socket each time; what was not answered is sent again."""
    server = make_server()
    witness = Witness(server.export.uri, BLOCKS, seed=1)
    try:
        here, there = ("default", segment), ("other", other)
        for turn in range(4):
            seen = witness.answered + 2000
            eventually(lambda least=seen: witness.answered > least, "the client works")  # type: ignore[misc]
            argv = [sys.executable, "-m", "tmem", "--name", there[0], "receive"]
            with handoff.receiver(argv) as (answers, stream):
                done = handoff.send(here[1], here[0], "guest1", answers, stream)
            assert done.rounds >= 3
            assert (names(here[1]), names(there[1])) == ([], ["guest1"])
            assert server.process is not None
            server.process.wait(DEADLINE_S)
            moved = Server(SegmentPaths(there[0], runtime_dir), server.export, tmp_path / f"{turn}.log")
            moved.start()
            server.process = moved.process  # so that the fixture ends it
            here, there = there, here
        seen = witness.answered + 2000
        eventually(lambda: witness.answered > seen, "the client works in the end")
    finally:
        witness.stop()
    assert witness.connections == 4 + 1 + 1  # the last one to verify
    assert witness.sent_again > 0
    for store in (segment, other):
        store.reap()
        assert store.check() == []


def test_a_handoff_that_fails_is_not_noticed_either(
    swap_server: Server, segment: "_native.Segment", other: "_native.Segment"
) -> None:
    other.client("guest1")
    witness = Witness(swap_server.export.uri, BLOCKS, seed=2)
    try:
        for argv in (
            [sys.executable, "-m", "tmem", "--name", "other", "receive"],
            ["false"],
        ):
            seen = witness.answered + 1000
            eventually(lambda least=seen: witness.answered > least, "the client works")  # type: ignore[misc]
            with pytest.raises(HandoffError), handoff.receiver(argv) as (answers, stream):
                handoff.send(segment, "default", "guest1", answers, stream)
        seen = witness.answered + 1000
        eventually(lambda: witness.answered > seen, "the client works in the end")
    finally:
        witness.stop()
    assert witness.connections == 2


def test_the_device_moves_with_its_client(
    tmem: "Callable[..., CompletedProcess[str]]", paths: SegmentPaths, segment: "_native.Segment"
) -> None:
    """The command moves server and record as well, and the device is at the same address."""
    there = SegmentPaths("other", paths.directory)
    for arguments in (["start", "-d"], ["--name", "other", "start", "-d", "--memory", "64M"]):
        assert tmem(*arguments).returncode == 0
    try:
        uri = tmem("swap", "add", "guest1", "--size", "16M").stdout.splitlines()[-1]
        witness = Witness(uri, BLOCKS, seed=3)
        try:
            eventually(lambda: witness.answered > 2000, "the client works")
            moved = tmem("handoff", "guest1", "--to", "other")
            assert (moved.returncode, moved.stderr) == (0, "")
            assert moved.stdout.splitlines()[-1] == uri
            seen = witness.answered + 2000
            eventually(lambda: witness.answered > seen, "the client works in the other segment")
        finally:
            witness.stop()
        assert not paths.record("swap", "guest1").exists()
        assert json.loads(there.record("swap", "guest1").read_text())["client"] == "guest1"
        assert names(segment) == []
        assert tmem("--name", "other", "swap", "remove", "guest1").returncode == 0
    finally:
        tmem("--name", "other", "swap", "remove", "guest1")
        tmem("--name", "other", "stop")
        tmem("--name", "other", "destroy", "--all")


def test_moved_elsewhere_it_says_what_to_run_there(
    make_server: Callable[..., Server],
    tmem: "Callable[..., CompletedProcess[str]]",
    segment: "_native.Segment",
    other: "_native.Segment",
) -> None:
    server = make_server()
    moved = tmem("handoff", "guest1", "--through", f"{sys.executable} -m tmem --name other receive")
    assert (moved.returncode, moved.stderr) == (0, "")
    assert moved.stdout.splitlines()[-1] == (
        f"its device is served there by: tmem swap add guest1 --size {16 << 20} --unix {server.export.unix}"
    )
    assert (names(segment), names(other)) == ([], ["guest1"])
    assert server.process is not None
    assert server.process.wait(DEADLINE_S) == 0
    assert not server.paths.record("swap", "guest1").exists()


def test_without_a_manager_there_nothing_moves(
    make_server: Callable[..., Server],
    tmem: "Callable[..., CompletedProcess[str]]",
    segment: "_native.Segment",
    other: "_native.Segment",
) -> None:
    server = make_server()
    moved = tmem("handoff", "guest1", "--to", "other")
    assert moved.returncode == 1
    assert "no manager runs for segment 'other'" in moved.stderr
    assert (names(segment), names(other)) == (["guest1"], [])
    assert server.process is not None
    assert server.process.poll() is None


def test_a_device_that_is_attached_here_stays(
    tmem: "Callable[..., CompletedProcess[str]]",
    paths: SegmentPaths,
    segment: "_native.Segment",
    other: "_native.Segment",
) -> None:
    segment.client("guest1").new_pool(persistent=True)
    attachment = Attachment("nbdfuse", "/dev/loop77")
    Export("guest1", 16 << 20, unix=str(paths.state / "none.sock"), attachment=attachment).save(paths)
    try:
        moved = tmem("handoff", "guest1", "--to", "other")
        assert moved.returncode == 1
        assert "guest1 is attached to this machine as /dev/loop77" in moved.stderr
        assert "'tmem --name default swap remove guest1'" in moved.stderr
        assert (names(segment), names(other)) == (["guest1"], [])
    finally:
        paths.record("swap", "guest1").unlink()
