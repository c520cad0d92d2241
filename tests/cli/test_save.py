"""``save``, ``restore``, ``handoff`` and ``receive`` as people run them, also when they are killed."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.types import OID_SIZE, PAGE_SIZE

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native

OID = bytes(OID_SIZE)


@pytest.fixture
def other(runtime_dir: Path) -> Iterator["_native.Segment"]:
    """A second segment, called ``other``."""
    from tmem.backends import _native

    (runtime_dir / "other.d").mkdir(mode=0o700)
    made = _native.create(str(runtime_dir / "other"), 64 << 20)
    yield made
    made.close()


def data_of(npages: int) -> bytes:
    """Pages of which two fifths are noise."""
    rng = random.Random(npages)
    return b"".join(rng.randbytes(1600) + bytes(PAGE_SIZE - 1600) for _ in range(npages))


def put(segment: "_native.Segment", name: str, npages: int) -> bytes:
    """Make a client with so many pages; what they are."""
    data = data_of(npages)
    pool = segment.client(name).new_pool(persistent=True)
    for at in range(0, npages, 256):
        pool.put(OID, at, data[at * PAGE_SIZE : (at + 256) * PAGE_SIZE])
    assert pool.statistics()["pages"] == npages
    return data


def got(segment: "_native.Segment", name: str, npages: int) -> bytes:
    (pool,) = segment.client(name, create=False).pools()
    buffer = bytearray(npages * PAGE_SIZE)
    assert pool.get(OID, 0, buffer) == npages
    return bytes(buffer)


def names(segment: "_native.Segment") -> list[str]:
    return sorted(client.name for client in segment.clients())


def begin(*arguments: str, **options: object) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-m", "tmem", *arguments]
    return subprocess.Popen(argv, **{"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options})  # type: ignore[call-overload, no-any-return]


def test_there_and_back(
    tmem: Tmem, segment: "_native.Segment", other: "_native.Segment", tmp_path: Path
) -> None:
    one, two = put(segment, "one", 300), put(segment, "two", 5)
    file = str(tmp_path / "file")
    result = tmem("save", file)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [line.split(" pages")[0] for line in lines[:2]] == ["one: 300", "two: 5"]
    assert "frozen for" in lines[0]
    assert lines[2].startswith(f"{file}: 2 clients, ")
    result = tmem("--name", "other", "restore", file)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("one, two: 305 pages, ")
    assert (got(other, "one", 300), got(other, "two", 5)) == (one, two)


def test_choosing_and_renaming(tmem: Tmem, segment: "_native.Segment", tmp_path: Path) -> None:
    put(segment, "one", 3)
    two = put(segment, "two", 5)
    file = str(tmp_path / "file")
    assert tmem("save", file, "--client", "two").status == 0
    assert tmem("restore", file, "--client", "two", "--as", "three").status == 0
    assert got(segment, "three", 5) == two
    assert names(segment) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["save", "FILE", "--client", "none"], "has no client 'none'"),
        (["save", "/none/such"], "there is no directory /none: make it"),
        (["restore", "/none/such"], "/none/such cannot be read (No such file"),
        (["restore", "/"], "is a directory"),
        (["restore", "/dev/null"], "/dev/null is empty"),
        (["restore", "FILE", "--as", "a/b"], "is no client name"),
        (["handoff", "none", "--to", "other"], "has no client 'none'"),
        (["handoff", "one", "--to", "nowhere"], "there is no segment 'nowhere': create it"),
        (["handoff", "one", "--through", "none-such receive"], "none-such cannot be run"),
        (["handoff", "one", "--through", "true"], "the answer of the receiver is empty"),
        (["--name", "nowhere", "save", "FILE"], "there is no segment 'nowhere'"),
        (["--name", "nowhere", "restore", "FILE"], "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(
    tmem: Tmem, segment: "_native.Segment", tmp_path: Path, arguments: list[str], reason: str
) -> None:
    put(segment, "one", 1)
    result = tmem(*(str(tmp_path / "file") if word == "FILE" else word for word in arguments))
    assert result.status == 1
    assert reason in result.err
    assert result.err.startswith("tmem: ")
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert segment.client("one").phase == "none"


@pytest.mark.parametrize(
    "arguments",
    [
        ["handoff", "one"],
        ["handoff", "one", "--to", "other", "--through", "x"],
        ["handoff", "one", "--to", "default"],
        ["handoff", "one", "--through", " "],
        ["save"],
    ],
    ids=" ".join,
)
def test_wrong_usage(tmem: Tmem, segment: "_native.Segment", arguments: list[str]) -> None:
    assert tmem(*arguments).status == 2


def test_nothing_goes_to_or_comes_from_a_terminal(segment: "_native.Segment") -> None:
    ours, theirs = os.openpty()
    for arguments, stream in ((["save", "-"], "stdout"), (["restore", "-"], "stdin"), (["receive"], "stdin")):
        process = begin(*arguments, **{stream: theirs})
        _, err = process.communicate(timeout=60)
        assert (process.returncode, b"terminal" in err or b"by hand" in err) == (2, True)
    os.close(ours)
    os.close(theirs)


def test_progress_is_for_terminals(segment: "_native.Segment", tmp_path: Path) -> None:
    put(segment, "one", 12000)
    ours, theirs = os.openpty()
    process = begin("save", str(tmp_path / "file"), stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # that is how the end of a terminal shows
        while more := os.read(ours, 65536):
            shown += more
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, out.count(b"\n")) == (0, 2)
    assert b"save" in shown
    assert b" MB" in shown


def test_a_pipe_from_one_to_the_other(segment: "_native.Segment", other: "_native.Segment") -> None:
    data = put(segment, "one", 2000)
    saving = begin("save", "-", stdout=subprocess.PIPE)
    restoring = begin("--name", "other", "restore", "-", stdin=saving.stdout)
    assert saving.stdout is not None
    saving.stdout.close()
    _, err = saving.communicate(timeout=60)
    assert b"one: 2000 pages" in err
    assert (saving.returncode, restoring.wait(60)) == (0, 0)
    assert restoring.stderr is not None
    restoring.stderr.close()
    assert got(other, "one", 2000) == data


def test_a_file_is_only_replaced_when_told(tmem: Tmem, segment: "_native.Segment", tmp_path: Path) -> None:
    put(segment, "one", 3)
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    result = tmem("save", str(file))
    assert (result.status, "exists already" in result.err) == (1, True)
    assert file.read_bytes() == b"precious"
    assert tmem("save", str(file), "--force").status == 0
    assert tmem("restore", str(file), "--as", "two").status == 0


# -- killed and interrupted


def blocked_save() -> "subprocess.Popen[bytes]":
    """Begin a save to a pipe, and return when it is full."""
    process = begin("save", "-", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(100_000).startswith(b"\x89TMEM")
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_save(segment: "_native.Segment", number: int) -> None:
    data = put(segment, "one", 6000)
    process = blocked_save()
    assert segment.client("one").phase == "copying"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    segment.reap()
    assert segment.client("one").phase == "none"
    assert got(segment, "one", 6000) == data


def test_a_killed_save_leaves_the_client_working(
    tmem: Tmem, segment: "_native.Segment", tmp_path: Path
) -> None:
    data = put(segment, "one", 6000)
    process = blocked_save()
    process.kill()
    process.communicate(timeout=60)
    segment.reap()
    assert segment.client("one").phase == "none"
    assert got(segment, "one", 6000) == data
    assert segment.check() == []
    assert tmem("save", str(tmp_path / "file")).status == 0
    assert tmem("restore", str(tmp_path / "file"), "--as", "two").status == 0
    assert got(segment, "two", 6000) == data


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_file_that_is_not_finished_does_not_stay(
    segment: "_native.Segment", tmp_path: Path, number: int
) -> None:
    put(segment, "one", 12000)
    file, partial = tmp_path / "file", tmp_path / "file.partial"
    for _ in range(20):
        process = begin("save", str(file), stdout=subprocess.PIPE)
        while not partial.exists() and process.poll() is None:
            pass
        process.send_signal(number)
        process.communicate(timeout=60)
        if not file.exists():
            break
        file.unlink()  # it was quicker
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert partial.exists() == (number == signal.SIGKILL)
    segment.reap()
    assert segment.client("one").phase == "none"


def test_a_restore_that_ends_in_the_middle_leaves_nothing(
    tmem: Tmem,
    segment: "_native.Segment",
    other: "_native.Segment",
    tmp_path: Path,
    eventually: Callable[..., None],
) -> None:
    for name in ("one", "two"):
        put(segment, name, 6000)
    file = tmp_path / "file"
    assert tmem("save", str(file)).status == 0
    content = file.read_bytes()
    for number, share in ((signal.SIGKILL, 0.3), (signal.SIGINT, 0.5), (signal.SIGKILL, 0.9), (0, 0.9)):
        process = begin("--name", "other", "restore", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(content[: int(len(content) * share)])
        process.stdin.flush()
        wanted = int(12000 * share) - 3000  # a frame of 4 MiB is taken as a whole
        eventually(lambda least=wanted: other.statistics()["persistent_pages"] > least)
        assert names(other) == []
        if number:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if not number:
            assert b"standard input ends early" in err
            assert err.count(b"\n") == 1
        other.reap()
        assert names(other) == []
        other.reap()
        assert other.statistics()["persistent_pages"] == 0
        assert other.check() == []
    assert tmem("--name", "other", "restore", str(file)).status == 0
    assert names(other) == ["one", "two"]


def test_a_restore_killed_at_any_moment_is_all_or_nothing(
    tmem: Tmem, segment: "_native.Segment", other: "_native.Segment", tmp_path: Path
) -> None:
    data = {name: put(segment, name, 1000) for name in ("one", "two")}
    file = str(tmp_path / "file")
    assert tmem("save", file).status == 0
    rng = random.Random(4)
    for _ in range(10):
        process = begin("--name", "other", "restore", file, stdout=subprocess.PIPE)
        least = rng.randrange(2001)
        while other.statistics()["persistent_pages"] < least and process.poll() is None:
            pass
        process.kill()
        process.communicate()
        other.reap()
        found = names(other)
        assert found in ([], ["one", "two"])
        for name in found:
            assert got(other, name, 1000) == data[name]
            other.client(name).destroy()
        other.reap()
        assert other.statistics()["persistent_pages"] == 0
        assert other.check() == []


# -- handed over


def test_handed_over_to_a_segment_here(
    tmem: Tmem, segment: "_native.Segment", other: "_native.Segment"
) -> None:
    data = put(segment, "one", 2000)
    put(segment, "two", 1)
    result = tmem("handoff", "one", "--to", "other")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("one: 2000 pages in ")
    assert "stood still for" in result.out
    assert (names(segment), names(other)) == (["two"], ["one"])
    assert got(other, "one", 2000) == data


def test_handed_over_through_a_command(
    tmem: Tmem, segment: "_native.Segment", other: "_native.Segment", tmp_path: Path
) -> None:
    """The command stands for ssh: it has another environment, and says something on standard error."""
    data = put(segment, "one", 100)
    script = tmp_path / "far"
    script.write_text(f"#!/bin/sh\necho banner >&2\nexec {sys.executable} -m tmem --name other receive\n")
    script.chmod(0o755)
    result = tmem("handoff", "one", "--through", str(script))
    assert (result.status, result.err) == (0, "banner\n")
    assert got(other, "one", 100) == data


def test_a_receiver_that_refuses_is_one_line(
    tmem: Tmem, segment: "_native.Segment", other: "_native.Segment"
) -> None:
    put(segment, "one", 100)
    other.client("one")
    result = tmem("handoff", "one", "--to", "other")
    assert result.status == 1
    assert "'one' was not handed over and stays in segment 'default': the receiver refused: " in result.err
    assert result.err.count("\n") == 1
    assert segment.client("one").phase == "none"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_handoff_leaves_the_client_where_it_is(
    segment: "_native.Segment", tmp_path: Path, eventually: Callable[..., None], number: int
) -> None:
    """The receiver begins and then takes nothing, so the sender stands in the middle."""
    data = put(segment, "one", 2000)
    far = tmp_path / "far.py"
    far.write_text(
        "import time\n"
        "from tmem.backends.saverecords import Header\n"
        "from tmem.backends.streams import FrameOutput\n"
        "out = FrameOutput(1)\n"
        "out.document(1, 0, Header.here('receive', 'far', (), '').document())\n"
        "time.sleep(60)\n"
    )
    process = begin("handoff", "one", "--through", f"{sys.executable} {far}", stdout=subprocess.PIPE)
    eventually(lambda: segment.client("one").phase == "copying")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert segment.client("one").phase == "none"
    assert got(segment, "one", 2000) == data


def test_a_sender_that_says_nothing(segment: "_native.Segment") -> None:
    process = begin("receive", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")  # the sender was told, and says it
    assert b"the handoff is empty: hand over again" in out
