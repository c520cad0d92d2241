"""``freeze``, ``thaw``, ``off``, ``on`` and ``flush``: what they let through and what they give back."""

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tmem.cli.main import run
from tmem.types import OID_SIZE, PAGE_SIZE, parse_size

if TYPE_CHECKING:
    from tmem.backends import _native

OID = bytes(OID_SIZE)
MIB = 1 << 20


def pools(segment: "_native.Segment", name: str = "one") -> "tuple[_native.Pool, _native.Pool]":
    """A persistent and a non-exclusive ephemeral pool of a new client, with a page each."""
    client = segment.client(name)
    made = client.new_pool(persistent=True), client.new_pool(persistent=False, exclusive=False)
    for pool in made:
        assert pool.put(OID, 0, os.urandom(PAGE_SIZE)) == 1
    return made


def readable(pool: "_native.Pool", index: int = 0) -> bool:
    return pool.get(OID, index, bytearray(PAGE_SIZE)) == 1


def test_frozen_refuses_pages_and_keeps_the_rest(segment: "_native.Segment") -> None:
    persistent, ephemeral = pools(segment)
    assert run(["freeze", "one"]) == 0
    assert segment.client("one").mode == "frozen"
    for pool in (persistent, ephemeral):
        assert pool.put(OID, 1, os.urandom(PAGE_SIZE)) == 0
        assert readable(pool)
        assert pool.put(OID, 0, os.urandom(PAGE_SIZE)) == 0  # a refused duplicate leaves a miss
        assert not readable(pool)
    assert run(["freeze", "one"]) == 0
    assert run(["thaw", "one"]) == 0
    for pool in (persistent, ephemeral):
        assert not readable(pool)
        assert pool.put(OID, 0, os.urandom(PAGE_SIZE)) == 1


def test_off_drops_what_is_ephemeral(segment: "_native.Segment") -> None:
    persistent, ephemeral = pools(segment)
    other = pools(segment, "two")[1]
    assert run(["off", "one"]) == 0
    assert not segment.client("one").usable
    assert readable(persistent)
    assert ephemeral.statistics()["pages"] == 0
    assert ephemeral.put(OID, 0, os.urandom(PAGE_SIZE)) == 0
    assert readable(other)
    assert run(["on", "one"]) == 0
    assert segment.client("one").usable
    assert not readable(ephemeral)
    assert ephemeral.put(OID, 0, os.urandom(PAGE_SIZE)) == 1


def test_all_is_the_segment_and_leaves_clients_as_they_are(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    pools(segment)
    _, ephemeral = pools(segment, "two")
    assert run(["freeze", "one"]) == 0
    assert run(["freeze", "--all"]) == 0
    assert (segment.mode, segment.client("two").mode) == ("frozen", "on")
    assert ephemeral.put(OID, 1, os.urandom(PAGE_SIZE)) == 0
    assert readable(ephemeral)
    assert capsys.readouterr().err == ""

    assert run(["thaw", "two"]) == 0  # it is not what holds it up
    assert "the segment is frozen" in capsys.readouterr().err
    assert run(["thaw", "--all"]) == 0
    assert capsys.readouterr().err == "tmem: these are restricted by name, and stay so: one (frozen)\n"
    assert (segment.mode, segment.client("one").mode) == ("on", "frozen")
    assert ephemeral.put(OID, 1, os.urandom(PAGE_SIZE)) == 1

    assert run(["off", "--all"]) == 0
    assert not readable(ephemeral)
    assert segment.statistics()["ephemeral_pages"] == 0
    assert run(["on", "--all"]) == 0
    assert segment.mode == "on"


@pytest.mark.parametrize("target", ["one", "--all"])
def test_off_is_more_than_frozen(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str], target: str
) -> None:
    pools(segment)
    assert run(["off", target]) == 0
    assert run(["freeze", target]) == 0
    assert "is off already" in capsys.readouterr().err
    assert run(["thaw", target]) == 1
    assert f"use 'tmem on {target}'" in capsys.readouterr().err
    assert (segment.mode if target == "--all" else segment.client("one").mode) == "off"
    assert run(["on", target]) == 0
    assert run(["thaw", target]) == 0
    assert (segment.mode, segment.client("one").mode) == ("on", "on")


DEPART = """
import sys
from tmem.backends import segment
client = segment.attach("default").client(sys.argv[1], create=False)
for step in ("copy", "freeze", "depart"):
    client.handoff(step)
"""


def depart(name: str) -> None:
    """Leave a client as a sender does that dies before its last answer."""
    subprocess.run([sys.executable, "-c", DEPART, name], check=True)


@pytest.mark.parametrize("verb", ["thaw", "on", "destroy"])
def test_what_has_departed_is_not_touched_without_force(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """A handoff that got no answer: only the operator can know where the client lives."""
    pools(segment)
    depart("one")
    assert run([verb, "one"]) == 1
    error = capsys.readouterr().err
    assert "'tmem thaw one --force'" in error
    assert "'tmem destroy one --force'" in error
    assert segment.client("one").phase == "departed"
    assert run(["list"]) == 0
    assert "departed" in capsys.readouterr().out


def test_a_departed_client_is_taken_back_or_ended(segment: "_native.Segment") -> None:
    for name in ("one", "two"):
        persistent, _ = pools(segment, name)
        depart(name)
    assert run(["thaw", "one", "--force"]) == 0
    assert segment.client("one").phase == "none"
    assert readable(segment.client("one").pool(0))
    assert segment.client("one").pool(0).put(OID, 5, os.urandom(PAGE_SIZE)) == 1
    assert run(["destroy", "two", "--force"]) == 0
    assert not persistent.alive
    assert [client.name for client in segment.clients()] == ["one"]


@pytest.fixture
def full(segment: "_native.Segment") -> "_native.Segment":
    """4 MiB of persistent pages of one client, 16 MiB of ephemeral ones of it and of another."""
    for name in ("one", "two"):
        ephemeral = segment.client(name).new_pool(persistent=False)
        assert ephemeral.put(OID, 0, os.urandom(16 * MIB)) == 16 * MIB // PAGE_SIZE
    persistent = segment.client("one").new_pool(persistent=True)
    assert persistent.put(OID, 0, os.urandom(4 * MIB)) == 4 * MIB // PAGE_SIZE
    return segment


def ephemeral_bytes(segment: "_native.Segment", name: str) -> int:
    return segment.client(name).statistics()["ephemeral_bytes"]


def test_flush_all_leaves_what_is_persistent(
    full: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    used = full.statistics()["used_bytes"]
    assert run(["flush", "--all", "--bytes"]) == 0
    assert int(capsys.readouterr().out) >= 30 * MIB
    assert full.statistics()["ephemeral_pages"] == 0
    assert full.statistics()["persistent_pages"] == 4 * MIB // PAGE_SIZE
    assert full.statistics()["used_bytes"] <= used - 30 * MIB
    assert full.check() == []


def test_flush_of_a_client_leaves_the_others(
    full: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    before = ephemeral_bytes(full, "two")
    assert run(["flush", "one"]) == 0
    evicted, returned = (parse_words(part) for part in capsys.readouterr().out.split(", "))
    assert evicted >= 15 * MIB
    assert returned >= 14 * MIB
    assert ephemeral_bytes(full, "one") == 0
    assert ephemeral_bytes(full, "two") == before
    assert full.client("one").statistics()["persistent_pages"] == 4 * MIB // PAGE_SIZE


def parse_words(text: str) -> float:
    """The bytes of ``12.5M evicted``."""
    number = text.split()[0]
    return float(number[:-1]) * parse_size(f"1{number[-1]}")


def test_flush_of_a_size(full: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    before = ephemeral_bytes(full, "one") + ephemeral_bytes(full, "two")
    assert run(["flush", "--all", "--size", "8M", "--bytes"]) == 0
    returned = int(capsys.readouterr().out)
    left = ephemeral_bytes(full, "one") + ephemeral_bytes(full, "two")
    assert 7 * MIB <= returned <= 8 * MIB
    assert 8 * MIB <= before - left <= 9 * MIB
    assert run(["flush", "--all", "--size", "0"]) == 0
    assert ephemeral_bytes(full, "one") + ephemeral_bytes(full, "two") == left
    assert run(["flush", "--all", "--size", "1000T"]) == 0
    assert full.statistics()["ephemeral_pages"] == 0
