"""``list`` and ``freeable`` show what is in the segment, with and without a manager."""

import json
import os
import resource
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.cli.main import run
from tmem.types import OID_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native


@pytest.fixture
def filled(segment: "_native.Segment") -> "_native.Segment":
    """One client with both kinds of pool, the other with none."""
    client = segment.client("web1")
    client.new_pool(persistent=True).put(bytes(OID_SIZE), 0, os.urandom(10 * PAGE_SIZE))
    ephemeral = client.new_pool(persistent=False, exclusive=False)
    ephemeral.put(bytes(OID_SIZE), 0, b"tmem" * (20 * PAGE_SIZE // 4))
    ephemeral.get(bytes(OID_SIZE), 0, bytearray(PAGE_SIZE))
    ephemeral.get(bytes(OID_SIZE), 99, bytearray(PAGE_SIZE))
    segment.client("empty")
    return segment


def test_it_answers_quickly(filled: "_native.Segment") -> None:
    """Within 0.3 s on a machine that has nothing else to do; here its CPU time counts, doubled."""
    least = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "tmem", "list"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert least < 0.6


def test_json_carries_every_counter(filled: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["name"], state["path"], state["manager_pid"]) == ("default", filled.path, None)
    assert (state["mode"], state["timing"]["put_stored"].keys()) == (
        "on",
        {"samples", "total_ns", "least_ns", "most_ns", "buckets"},
    )
    assert state["memory"]["memory_bytes"] == filled.memory_bytes
    assert state["memory"]["freeable_bytes"] == filled.freeable_bytes()
    empty, web = state["clients"]
    assert (empty["name"], empty["pools"], web["name"]) == ("empty", [], "web1")
    for name, value in {
        "mode": "on",
        "phase": "none",
        "compress": "auto",
        "weight": 100,
        "cap_bytes": 0,
        "floor_bytes": 0,
        "held": False,
        "authorised": [],
        "persistent_pages": 10,
        "ephemeral_pages": 20,
    }.items():
        assert web[name] == value
    assert {*web["timing"]} == {"put_stored", "put_refused", "get_hit", "get_missed"}
    assert web["timing"]["put_stored"].keys() == state["timing"]["put_stored"].keys()
    persistent, ephemeral = web["pools"]
    assert (persistent["type"], persistent["shared"], persistent["pages"]) == ("persistent", False, 10)
    assert (persistent["uuid"], persistent["owner"], persistent["sharers"]) == (None, "web1", ["web1"])
    assert persistent["bytes"] >= 10 * PAGE_SIZE
    assert (ephemeral["type"], ephemeral["exclusive"], ephemeral["pages"]) == ("ephemeral", False, 20)
    assert ephemeral["fill_pages"] == 20  # "tmem" over and over is one repeated word
    assert (ephemeral["gets"], ephemeral["gets_hit"]) == (2, 1)
    assert (ephemeral["puts"], ephemeral["puts_stored"], ephemeral["puts_refused"]) == (20, 20, 0)


def test_table_is_for_people(filled: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "64M" in out[0]
    assert "no manager runs" in out[0]
    assert out[1].split()[:5] == ["CLIENT", "STATE", "POOL", "TYPE", "PAGES"]
    assert [line.split()[:2] for line in out[2:]] == [
        ["empty", "unserved"],
        ["web1", "unserved"],
        ["web1", "unserved"],
    ]
    assert "50.0" in out[4].split()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_shows_what_matters_most_in_full(filled: "_native.Segment", width: int) -> None:
    """By script(1), which is a terminal to whom it runs.

    readline, which pytest imports, exports COLUMNS=80; some shells mend that after stty(1) and others do not.
    """
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    client = filled.client("guest-of-some-length")
    client.cap_bytes = 1 << 20
    pool = client.new_pool(persistent=True)
    pool.put(bytes(OID_SIZE), 0, os.urandom(400 * PAGE_SIZE))
    command = f"stty cols {width} rows 50; NO_COLOR=1 TERM=dumb {sys.executable} -m tmem list"
    done = subprocess.run(
        ["script", "-qec", command, os.devnull],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env=plain | {"SHELL": "/bin/sh"},
    )
    lines = done.stdout.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= width
    (at,) = [number for number, line in enumerate(lines) if line.startswith("CLIENT")]
    headings = lines[at].split()
    assert {"CLIENT", "STATE", "TYPE", "MEMORY", "RATIO", "HIT%", "REFUSED"} <= {*headings}
    assert ("PAGES" in headings) == (width == 200)
    assert ("CORRUPT" in headings) == (width == 200)
    (guest,) = [line.split() for line in lines if line.startswith("guest-of-some-length ")]
    assert guest[headings.index("TYPE")] == "persistent"
    assert int(guest[headings.index("REFUSED")]) > 100
    assert "\u2026" not in done.stdout


def test_one_client_alone(filled: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "empty", "--json"]) == 0
    assert [client["name"] for client in json.loads(capsys.readouterr().out)["clients"]] == ["empty"]
    assert run(["list", "web1"]) == 0
    out = capsys.readouterr().out
    assert "empty" not in out
    assert out.count("web1") == 2


def test_the_long_form_has_every_value_of_the_json_form(
    filled: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["list", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert run(["list", "-l"]) == 0
    words = capsys.readouterr().out.split()
    parts = [state["memory"], *state["timing"].values(), *state["clients"], *state["clients"][1]["pools"]]
    assert {name for part in parts for name in part} - {"pools", "buckets"} <= set(words)
    assert words.count("put_stored") == 3  # of the segment, and of each client
    assert str(filled.memory_bytes) in words


def served(segment: "_native.Segment", name: str, ended: threading.Event) -> threading.Thread:
    """A thread that holds the client, as the main thread of a server does."""
    held = threading.Event()

    def hold() -> None:
        segment.client(name).hold()
        held.set()
        ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    return thread


def states(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The column STATE, one a line."""
    assert run(["list"]) == 0
    return [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]]


def test_states(
    segment: "_native.Segment",
    capsys: pytest.CaptureFixture[str],
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    ended = threading.Event()
    for name in ("a", "b", "c"):
        segment.client(name)
    thread = served(segment, "a", ended)
    try:
        segment.client("b").mode = "off"
        assert states(capsys) == ["on", "off", "unserved"]
        assert run(["list", "a", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["clients"][0]["held"] is True
        segment.mode = "frozen"
        assert states(capsys) == ["frozen", "off", "frozen"]
        assert run(["list"]) == 0
        assert capsys.readouterr().out.startswith("segment default: frozen, ")
        segment.mode = "on"
        segment.client("c").handoff("copy")
        assert states(capsys) == ["on", "off", "copying"]
        segment.client("c").handoff("end")
    finally:
        ended.set()
        thread.join()
    # Python has joined the thread; to the kernel, which tells us of its end, it may last a moment longer.
    eventually(lambda: states(capsys) == ["unserved", "off", "unserved"])


def test_a_shared_pool_is_shown_by_each_sharer(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    key = uuid.UUID("6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a")
    for name in ("a", "b"):
        segment.client(name).authorise(key.bytes)
        segment.client(name).new_pool(persistent=False, uuid=key.bytes).put(
            bytes(OID_SIZE), 0, os.urandom(PAGE_SIZE)
        )
    assert run(["list", "--json"]) == 0
    clients = json.loads(capsys.readouterr().out)["clients"]
    for client in clients:
        (pool,) = client["pools"]
        assert client["authorised"] == [str(key)]
        assert (pool["type"], pool["shared"], pool["uuid"]) == ("ephemeral", True, str(key))
        assert (pool["owner"], pool["sharers"], pool["pages"], pool["puts"]) == ("a", ["a", "b"], 1, 2)
    assert [client["ephemeral_pages"] for client in clients] == [1, 0]  # the owner pays
    assert run(["list"]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[2:]] == ["shared", "shared"]


def test_an_empty_segment_says_what_to_do(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["list"]) == 0
    assert "tmem swap add" in capsys.readouterr().out


def test_freeable_counts_what_ephemeral_pages_hold(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["freeable", "--bytes"]) == 0
    assert int(capsys.readouterr().out) == segment.freeable_bytes()
    assert run(["freeable"]) == 0
    assert capsys.readouterr().out.strip()[-1] in "MG"


def test_another_segment_is_another_list(
    filled: "_native.Segment", runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--name", "other", "list"]) == 1
    assert "no segment 'other'" in capsys.readouterr().err
