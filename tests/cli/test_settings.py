"""``set`` and ``authorise``: what is set is in force, and what is refused changes nothing."""

import os
import re
import uuid
from typing import TYPE_CHECKING

import pytest

from tmem.cli.main import run
from tmem.errors import PoolError
from tmem.types import OID_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

MIB = 1 << 20
KEY = uuid.UUID("6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a")


def values(client: "_native.Client") -> tuple[int, int, int, str]:
    return client.weight, client.cap_bytes, client.floor_bytes, client.compress


def test_every_value(segment: "_native.Segment") -> None:
    client = segment.client("one")
    assert values(client) == (100, 0, 0, "auto")
    assert run(["set", "one", "--weight", "7", "--cap", "8M", "--floor", "4M", "--compress", "none"]) == 0
    assert values(client) == (7, 8 * MIB, 4 * MIB, "none")
    assert run(["set", "one", "--weight", "0"]) == 0
    assert values(client) == (0, 8 * MIB, 4 * MIB, "none")
    assert run(["set", "one", "--cap", "0", "--floor", "0", "--compress", "auto"]) == 0
    assert values(client) == (0, 0, 0, "auto")
    assert run(["set", "one", "--dedup"]) == 0
    assert client.dedup
    assert run(["set", "one", "--weight", "1", "--no-dedup"]) == 0
    assert not client.dedup


def test_values_are_in_force(segment: "_native.Segment") -> None:
    client = segment.client("one")
    pool = client.new_pool(persistent=True)
    page = b"compressible" * (PAGE_SIZE // 12) + b"tmem"
    assert run(["set", "one", "--compress", "none"]) == 0
    assert pool.put(bytes(OID_SIZE), 0, page) == 1
    assert pool.statistics()["raw_pages"] == 1
    assert run(["set", "one", "--cap", "1M"]) == 0
    stored = pool.put(bytes(OID_SIZE), 1, os.urandom(2 * MIB))
    assert 200 < stored < 256
    assert run(["set", "one", "--cap", "0"]) == 0
    assert pool.put(bytes(OID_SIZE), 1, os.urandom(2 * MIB)) == 512


def test_all_or_nothing(segment: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    client = segment.client("one")
    assert run(["set", "one", "--weight", "7", "--floor", "4M"]) == 0
    before = values(client)
    # More than the segment has: refused, whatever else is asked for.
    for others in (["--weight", "9"], ["--cap", "1M", "--compress", "none"], []):
        assert run(["set", "one", *others, "--floor", "65M"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("tmem: ")
        assert error.count("\n") == 1
        assert values(client) == before


def test_what_cannot_be_promised_names_what_can(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    """The floor that the message names is granted; what it says to change lets the client have more."""
    client = segment.client("one")

    def told(floor: str) -> str:
        assert run(["set", "one", "--floor", floor]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"one cannot be promised {floor} now, at most " in line
        return line

    def granted(line: str) -> int:
        most = re.search(r"at most (\d+[KM]):", line)
        assert most is not None, line
        assert run(["set", "one", "--floor", most[1]]) == 0
        found = client.floor_bytes
        assert run(["set", "one", "--floor", "0"]) == 0
        return found

    alone = told("64M")
    assert "a segment that was created larger ('start --memory')" in alone
    assert "floor of others" not in alone
    for name in ("two", "three"):
        segment.client(name).floor_bytes = 8 * MIB
    assert run(["resize", "48M"]) == 0
    capsys.readouterr()
    beside = told("64M")
    assert "lower the floor of others (three, 1 more)" in beside
    assert "'tmem --name default resize 64M'" in beside
    assert granted(beside) < 48 * MIB
    for name in ("two", "three"):
        segment.client(name).floor_bytes = 0
    assert run(["resize", "64M"]) == 0
    assert granted(alone) > 50 * MIB
    segment.client("two").floor_bytes = segment.client("two").most_floor_bytes
    assert "at most 4K" in told("64M")


def test_any_spelling_of_a_uuid(segment: "_native.Segment") -> None:
    client = segment.client("one")
    for text in (str(KEY), KEY.hex, f"{{{str(KEY).upper()}}}", KEY.urn):
        assert run(["authorise", "one", text]) == 0
        assert client.authorised() == [KEY.bytes]
        assert run(["authorise", "one", text]) == 0  # once more is no failure
        assert run(["authorise", "one", text, "--revoke"]) == 0
        assert client.authorised() == []


def test_it_is_what_lets_a_client_in(segment: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    one, two = segment.client("one"), segment.client("two")
    with pytest.raises(PoolError):
        one.new_pool(persistent=False, uuid=KEY.bytes)
    for name in ("one", "two"):
        assert run(["authorise", name, str(KEY)]) == 0
    first, second = (client.new_pool(persistent=False, uuid=KEY.bytes) for client in (one, two))
    page = os.urandom(PAGE_SIZE)
    assert first.put(bytes(OID_SIZE), 0, page) == 1
    buffer = bytearray(PAGE_SIZE)
    assert second.get(bytes(OID_SIZE), 0, buffer) == 1
    assert buffer == page
    assert run(["authorise", "two", str(KEY), "--revoke"]) == 0
    assert two.pools() == []  # it has left
    assert [pool.id for pool in one.pools()] == [first.id]
    assert run(["authorise", "two", str(KEY), "--revoke"]) == 1
    assert f"was not allowed to share {KEY}" in capsys.readouterr().err


def test_before_the_client_is_there(segment: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["authorise", "mnt-data", str(KEY)]) == 1
    assert f"'tmem authorise mnt-data {KEY} --create'" in capsys.readouterr().err
    assert segment.clients() == []
    assert run(["authorise", "mnt-data", str(KEY), "--create"]) == 0
    assert segment.client("mnt-data", create=False).authorised() == [KEY.bytes]
    assert run(["authorise", "../data", str(KEY), "--create"]) == 1
    assert run(["authorise", "gone", str(KEY), "--revoke"]) == 1
    assert [client.name for client in segment.clients()] == ["mnt-data"]


def test_there_are_only_so_many(segment: "_native.Segment", capsys: pytest.CaptureFixture[str]) -> None:
    segment.client("one")
    for number in range(1, 17):
        assert run(["authorise", "one", str(uuid.UUID(int=number))]) == 0
    assert run(["authorise", "one", str(uuid.UUID(int=17))]) == 1
    assert capsys.readouterr().err.startswith("tmem: ")
    assert len(segment.client("one").authorised()) == 16


def test_a_password_on_the_command_line_is_spoken_of_and_not_shown(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str]
) -> None:
    segment.client("one")
    run(["set", "one", "--tier", "redis://me:sesame@127.0.0.1:1/0?timeout=0.01"])  # nobody is there
    said = capsys.readouterr()
    assert "password_file=/PATH" in said.err.splitlines()[0]
    assert "sesame" not in said.out + said.err
    run(["set", "one", "--tier", "redis://127.0.0.1:1/0?timeout=0.01&user=me&password_file=/nowhere"])
    assert "in 'ps'" not in capsys.readouterr().err
    run(["list", "--json"])
    assert "sesame" not in capsys.readouterr().out
