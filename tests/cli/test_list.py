"""``list`` and ``freeable`` show what is in the segment, with and without a manager."""

import json
import os
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


def test_json_carries_every_counter(filled: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["name"], state["path"], state["manager_pid"]) == ("default", filled.path, None)
    assert state["memory"]["memory_bytes"] == filled.memory_bytes
    assert state["memory"]["freeable_bytes"] == filled.freeable_bytes()
    empty, web = state["clients"]
    assert (empty["name"], empty["pools"], web["name"]) == ("empty", [], "web1")
    persistent, ephemeral = web["pools"]
    assert (persistent["type"], persistent["shared"], persistent["pages"]) == ("persistent", False, 10)
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
    assert out[1].split()[:5] == ["CLIENT", "POOL", "TYPE", "PAGES", "DATA"]
    assert [line.split()[0] for line in out[2:]] == ["empty", "web1", "web1"]
    assert "50.0" in out[4].split()


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
