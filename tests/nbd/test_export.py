"""Records of swap devices: what is written is read, what is damaged is refused."""

import json
from pathlib import Path

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.backends.processes import Process
from tmem.errors import TmemError
from tmem.nbd import export
from tmem.nbd.export import Attachment, Export, SwapUse, load
from tmem.types import parse_host_port


@pytest.fixture
def records(tmp_path: Path) -> SegmentPaths:
    paths = SegmentPaths("default", tmp_path)
    paths.state.mkdir()
    return paths


EXPORTS = [
    Export("a", 4096, unix="/run/a b/%x.sock"),
    Export("b", 1 << 30, tcp=("::1", 10809), tls_psk="/etc/psk", tls_user="alice", reserve=True),
    Export("c", 8192, tcp=("host.example", 1), realtime=True, attachment=Attachment("nbd", "/dev/nbd3")),
    Export("d", 8192, unix="/s", attachment=Attachment("nbdfuse", "/dev/loop0", "/m", Process(12, 345))),
    Export("e", 8192, unix="/s", attachment=Attachment("nbdfuse", mount_dir="/m")),
    Export("f", 8192, unix="/s", attachment=Attachment("nbd", "/dev/nbd0"), use=SwapUse(7, discard=False)),
]


@pytest.mark.parametrize("one", EXPORTS, ids=lambda one: one.client)
def test_round_trip(records: SegmentPaths, one: Export) -> None:
    one.save(records)
    assert load(records, one.client) == one
    assert export.load_all(records) == [one]
    assert records.record("swap", one.client).stat().st_mode & 0o777 == 0o600


def test_uris() -> None:
    assert [one.uri for one in EXPORTS[:3]] == [
        "nbd+unix:///a?socket=/run/a%20b/%25x.sock",
        "nbds://alice@[::1]:10809/b?tls-psk-file=/etc/psk",
        "nbd://host.example:1/c",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"kind": "tmem swap device", "version": 2}',
        '{"kind": "tmem swap device", "version": 1}',
        '{"kind": "tmem swap device", "version": 1, "client": "other"}',
    ],
)
def test_damaged_records_are_refused(records: SegmentPaths, text: str) -> None:
    records.record("swap", "a").write_text(text)
    with pytest.raises(TmemError, match="is damaged or not of this version"):
        load(records, "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size_bytes", "4096"),
        ("size_bytes", True),
        ("size_bytes", 4097),
        ("unix", 1),
        ("tcp", ["host"]),
        ("tcp", ["host", 1]),
        ("attachment", {"kind": "nbd", "colour": "red"}),
        ("attachment", []),
        ("surplus", 1),
        ("reserve", None),
    ],
)
def test_records_with_a_wrong_value_are_refused(records: SegmentPaths, key: str, value: object) -> None:
    EXPORTS[0].save(records)
    path = records.record("swap", "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(TmemError, match="is damaged or not of this version"):
        load(records, "a")


def test_no_record(records: SegmentPaths) -> None:
    assert not export.exists(records, "a")
    with pytest.raises(TmemError, match="tmem swap add a --size SIZE"):
        load(records, "a")


@pytest.mark.parametrize("size_bytes", [0, -4096, 4095, (1 << 44) + 4096])
def test_impossible_sizes(size_bytes: int) -> None:
    with pytest.raises(TmemError, match="a multiple of 4096"):
        Export("a", size_bytes, unix="/s")


def test_impossible_addresses() -> None:
    with pytest.raises(TmemError, match="one address"):
        Export("a", 4096)
    with pytest.raises(TmemError, match="one address"):
        Export("a", 4096, unix="/s", tcp=("h", 1))
    with pytest.raises(TmemError, match="too long for a socket"):
        Export("a", 4096, unix="/" + "s" * 107)
    with pytest.raises(TmemError, match="TLS is for TCP"):
        Export("a", 4096, unix="/s", tls_psk="/etc/psk")


def test_host_and_port() -> None:
    assert parse_host_port("host:1") == ("host", 1)
    assert parse_host_port("[::1]:10809") == ("::1", 10809)
    for text in ("host", "host:", ":1", "::1:1", "host:0", "host:65536", "ho st:1", "host:1x"):
        with pytest.raises(TmemError, match="write HOST:PORT"):
            parse_host_port(text)
