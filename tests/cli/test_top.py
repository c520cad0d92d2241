"""``tmem top``: right numbers between two looks, 80 columns, and real keys in a real terminal."""

import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from tmem.backends.statistics import Timing
from tmem.cli import sampling
from tmem.cli.main import run
from tmem.cli.mountwatch import UNASKED, MountRow, MountsLook, MountWatcher, mount_rows, shown
from tmem.cli.sampling import SHARES, ClientRow, Look, Pressure, Row, clients, operations, rows
from tmem.cli.toptables import CLIENTS, MOUNTS, POOLS, Column, L, amount, duration, short
from tmem.cli.topview import TABLES, Frame, View, draw, ordered
from tmem.fs.statistics import Counters, MountStatistics
from tmem.types import OID_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from tmem.backends import _native

SECOND_NS = 1_000_000_000


@pytest.fixture
def looks(segment: "_native.Segment") -> tuple[Look, Look]:
    """Two looks, two seconds apart, between which a known number of things has happened."""
    key = uuid.UUID("6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a").bytes
    web, files, other = (segment.client(name) for name in ("web1", "files", "other"))
    segment.client("idle")
    persistent = web.new_pool(persistent=True)
    ephemeral = files.new_pool(persistent=False, exclusive=False)
    for one in (files, other):
        one.authorise(key)
    shared = files.new_pool(persistent=False, uuid=key)
    other.new_pool(persistent=False, uuid=key)
    persistent.put(bytes(OID_SIZE), 0, os.urandom(100 * PAGE_SIZE))
    before = sampling.take(segment, lambda: 5 * SECOND_NS)
    persistent.put(bytes(OID_SIZE), 100, os.urandom(60 * PAGE_SIZE))
    for index in range(80):
        ephemeral.put(bytes(OID_SIZE), index, (b"%04d" % index) * 512 + os.urandom(2048))
        ephemeral.get(bytes(OID_SIZE), 2 * index, bytearray(PAGE_SIZE))
    shared.put(bytes(OID_SIZE), 0, os.urandom(20 * PAGE_SIZE))
    files.mode = "frozen"
    files.pool(0).put(bytes(OID_SIZE), 500, os.urandom(PAGE_SIZE))
    files.mode = "off"
    return before, sampling.take(segment, lambda: 7 * SECOND_NS)


def test_rows_are_what_happened_in_between(looks: tuple[Look, Look]) -> None:
    found = {(row.name, row.kind): row for row in rows(*looks)}
    assert {*found} == {
        ("web1", "persistent"),
        ("files", "ephemeral"),
        ("files", "shared"),
        ("other", "shared"),
        ("idle", "-"),
    }
    web = found["web1", "persistent"]
    assert (web.puts_per_s, web.gets_per_s, web.hit_share) == (30, 0, None)
    assert web.data_bytes == 160 * PAGE_SIZE
    assert web.ratio == pytest.approx(0.985, abs=0.01)
    files = found["files", "ephemeral"]
    assert (files.puts_per_s, files.gets_per_s, files.refused_per_s) == (40.5, 40, 0.5)
    assert files.hit_share == 1 / 80  # the others were asked for before they were there
    assert (files.state, web.state, found["idle", "-"].puts_per_s) == ("off", "unserved", None)


def test_a_pool_that_is_new_or_came_again_has_no_rate(looks: tuple[Look, Look]) -> None:
    before, now = looks
    assert all(row.puts_per_s is None for row in rows(replace(before, pools={}), now))
    backwards = rows(now, replace(before, at_ns=now.at_ns + SECOND_NS))
    assert {row.puts_per_s for row in backwards if row.kind == "persistent"} == {None}


def test_times_of_each_client(looks: tuple[Look, Look]) -> None:
    before, now = looks
    found = {row.name: row for row in clients(before, now)}
    assert [*found] == ["files", "idle", "other", "web1"]
    assert (found["web1"].puts_per_s, found["web1"].gets_per_s) == (30, 0)
    assert (found["files"].puts_per_s, found["files"].trouble) == (50.5, True)  # of both pools
    assert found["idle"].put_ns == found["idle"].get_ns == (None,) * len(SHARES)
    busy = Timing(64, 64_000, 900, 1100, (0, 0, 0, 64, *(0,) * 21))
    more = replace(busy, samples=128, buckets=(0, 0, 0, 64, 0, 0, 0, 64, *(0,) * 17))

    def with_puts(look: Look, timing: Timing) -> Look:
        state, timings = look.times["web1"]
        return replace(look, times={**look.times, "web1": (state, {**timings, "put_stored": timing})})

    (web,) = [row for row in clients(with_puts(before, busy), with_puts(now, more)) if row.name == "web1"]
    assert all(value is not None and 8192 < value <= 16384 for value in web.put_ns)  # not those of before
    (again,) = [row for row in clients(with_puts(before, more), with_puts(now, busy)) if row.name == "web1"]
    assert all(value is not None and 512 < value <= 1024 for value in again.put_ns)  # another of its name
    text = "\n".join(drawn(frame((with_puts(before, busy), with_puts(now, more))), View(table=1), 80, 30))
    assert re.search(r"web1 unserved +30 +12us +16us +0 +- +- +-", text)
    assert TABLES[1] == "clients"


def test_a_shared_pool_counts_once_in_the_sums(looks: tuple[Look, Look]) -> None:
    found = operations(*looks)
    assert found["put_stored"].per_s == (60 + 80 + 20) / 2
    assert found["put_refused"].per_s == 0.5
    hits, missed = found["get_hit"].per_s, found["get_missed"].per_s
    assert hits is not None
    assert missed is not None
    assert hits + missed == 40
    assert found["compress"].per_s is None
    some = found["put_stored"].quantiles_ns
    assert all(one is not None and 50 < one < 1e9 for one in some)
    assert [*some] == sorted(one for one in some if one is not None)


def test_numbers_take_little_room() -> None:
    numbers = (None, 0, 7.5, 99.4, 123.4, 999.6, 12_345, 3.4e7, 5e12)
    assert [short(one) for one in numbers] == [
        *("-", "0", "7.5", "99.4", "123", "1.0k", "12.3k", "34M", "5T")
    ]
    for exponent in range(120):
        value = 1.3**exponent
        assert len(amount(value)) <= 5 or value > 1e14
        assert len(short(value)) <= 5 or value > 1e12
        assert len(duration(value)) <= 5 or value > 1e12
    assert [duration(one) for one in (None, 850.2, 6200, 99_900, 1.5e9)] == [
        "-",
        "850ns",
        "6.2us",
        "100us",
        "1.5s",
    ]
    assert [amount(one) for one in (0, 512, 10_035, 64 << 20, 3 << 29)] == [
        "0B",
        "512B",
        "9.8K",
        "64M",
        "1.5G",
    ]


def frame(looks: tuple[Look, Look], **changes: object) -> Frame:
    nothing = Pressure({"memory": 7.0, "io": 0.0, "cpu": 99.0}, {"memory": 30.0, "io": 0.0}, 10, 20)
    more = replace(nothing, swapped_in=2010, swapped_out=20)
    return replace(Frame("default", "12:00:00", 2.0, 4711, *looks, nothing, more), **changes)  # type: ignore[arg-type]


def drawn(shown: Frame, view: View, width: int, height: int | None, blocks: bool = True) -> list[str]:
    console = Console(width=width, height=height, highlight=False, record=True, file=open(os.devnull, "w"))  # noqa: PTH123,SIM115
    console.print(draw(shown, view, width, height, blocks))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 19), (80, 50), (140, 40)])
def test_a_frame_fits_its_terminal(looks: tuple[Look, Look], width: int, height: int) -> None:
    lines = drawn(frame(looks), View(), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "manager 4711" in lines[0]
    assert "memory 7%/30%" in text
    assert "swaps in 1k/s, out 0/s" in text
    assert re.search(r"web1.* persistent +640K", text) or height == 19
    assert ("STATE" in text) == (width >= 96)
    assert "quit" in lines[-1]


def test_what_has_no_room_is_told_and_can_be_reached(looks: tuple[Look, Look]) -> None:
    lines = drawn(frame(looks), View(), 80, 20)
    assert "1 to 2 of 5" in "\n".join(lines)
    assert "web1" not in "\n".join(lines)
    assert "web1" in "\n".join(drawn(frame(looks), View(first=3), 80, 20))


def test_tiers_in_trouble_are_told_beside_the_name(looks: tuple[Look, Look]) -> None:
    def tier(free: int | None, up: bool = True) -> dict[str, object]:
        return {"tier_up": up, "tier_free_bytes": free, "tier_capacity_bytes": 1000}

    for tiers, words in (
        ([tier(100), tier(None)], ""),
        ([tier(99), tier(100)], "1 tier nearly full"),
        ([tier(0), tier(99)], "2 tiers nearly full"),
        ([tier(0), tier(500, up=False)], "1 tier down"),
    ):
        lines = drawn(frame(looks, tiers=dict(enumerate(tiers))), View(), 80, 24)
        assert re.fullmatch(f"tmem default +{words} +manager 4711 .*", lines[0]), lines[0]
        assert len(lines) <= 24


def test_plain_terminals_get_plain_characters(looks: tuple[Look, Look]) -> None:
    lines = drawn(frame(looks, manager_pid=None), View(paused=True, help=True), 80, 30, blocks=False)
    assert all(line.isascii() for line in lines)
    assert "no manager" in lines[0]
    assert "paused" in lines[0]
    assert "Any key goes back." in lines[-3]


def test_every_column_sorts_both_ways() -> None:
    small = Row("a", "on", "ephemeral", 1, 1, 1.0, 1.0, 1.0, 0.1, 1.0, 1.0)
    large = Row("b", "on", "persistent", 2, 2, 2.0, 2.0, 2.0, 0.2, 2.0, 2.0)
    check_sorting([large, Row("c", "on", "-"), small], POOLS)


def test_so_does_every_column_of_clients() -> None:
    small = ClientRow("a", "on", 1.0, 1.0, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    large = ClientRow("b", "on", 2.0, 2.0, (2.0, 2.0), (2.0, 2.0), (2.0, 2.0))
    nothing = (None, None)
    check_sorting([large, ClientRow("c", "on", None, None, nothing, nothing, nothing), small], CLIENTS)


def test_and_every_column_of_mounts() -> None:
    small = MountRow("a", "a", "on", 1.0, 0.1, 1.0, 1.0, 1.0, 1)
    large = MountRow("b", "b", "on", 2.0, 0.2, 2.0, 2.0, 2.0, 2)
    check_sorting([large, MountRow("c", "c", "no answer"), small], MOUNTS)


def told(counts: dict[str, int], aside: bool = False, pool_active: bool = True) -> MountStatistics:
    return Counters(**counts).snapshot(pool_active=pool_active, stepped_aside=aside)


HITS = {"hit_pages": 100, "miss_pages": 50, "hit_bytes": 409_600, "hit_reads": 30}
MORE = {"hit_pages": 170, "miss_pages": 80, "hit_bytes": 2_506_752, "hit_reads": 50}
MORE |= {"miss_reads": 6, "passthrough_reads": 4, "lower_bytes": 122_880, "lower_errors": 3}
MOUNTED = (
    MountsLook(
        5 * SECOND_NS,
        {
            "/mnt/data": ("data", told(HITS)),
            "/mnt/again": ("again", told({"hit_pages": 900, "lower_errors": 7})),
            "/mnt/stuck": ("stuck", told({})),
        },
    ),
    MountsLook(
        7 * SECOND_NS,
        {
            "/mnt/data": ("data", told(MORE)),
            "/mnt/again": ("again", told({"hit_pages": 5, "lower_errors": 2}, aside=True)),
            "/mnt/stuck": ("stuck", None),
            "/mnt/[red]\n\udcff\x1b": ("odd", told({}, pool_active=False)),
        },
    ),
)
"""Two answers of mounts, two seconds apart."""


def test_mounts_between_two_answers(looks: tuple[Look, Look]) -> None:
    found = {row.client: row for row in mount_rows(MOUNTED)}
    data = found["data"]
    assert (data.reads_per_s, data.hit_share, data.misses_per_s) == (15, 0.7, 15)
    assert (data.hit_bytes_per_s, data.lower_bytes_per_s) == (1 << 20, 61_440)
    assert (data.state, data.errors, data.trouble) == ("on", 3, True)
    again = found["again"]  # another one, that was mounted there meanwhile
    assert (again.state, again.hit_share, again.errors, again.trouble) == ("aside", None, 2, False)
    assert (found["stuck"].state, found["stuck"].trouble) == ("no answer", True)
    assert found["odd"].state == "no pool"
    first = mount_rows((None, MOUNTED[0]))
    assert {row.reads_per_s for row in first} == {None}
    lines = drawn(frame(looks, mounts=MOUNTED), View(table=2), 80, 24)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert re.search(r"/mnt/data +15 +70\.0 +1M +60K +15 +3$", text, re.MULTILINE)
    assert re.search(r"/mnt/stuck no answer +- +- +- +- +- +-$", text, re.MULTILINE)
    assert r"/mnt/[red]\n\xff\x1b no pool" in text
    assert "\x1b" not in text
    assert "CLIENT" in "\n".join(drawn(frame(looks, mounts=MOUNTED), View(table=2), 120, 24))
    assert "asking the mounts" in "\n".join(drawn(frame(looks), View(table=2), 80, 24))
    none = frame(looks, mounts=(None, MountsLook(0)))
    assert "no mounts" in "\n".join(drawn(none, View(table=2), 80, 24))
    assert shown("/mnt/plain") == "/mnt/plain"


def test_nobody_waits_for_mounts(eventually: Callable[..., None]) -> None:
    answered = threading.Event()
    rounds: list[None] = []

    def ask() -> MountsLook:
        rounds.append(None)
        if len(rounds) == 1:
            answered.wait(30)
        elif len(rounds) == 2:
            raise OSError("no process can be had")
        return MountsLook(len(rounds))

    watcher = MountWatcher(ask)
    for _ in range(3):
        watcher.begin()
    eventually(lambda: len(rounds) == 1)
    known = [watcher.looks]
    answered.set()
    watcher.wait()
    known.append(watcher.looks)
    for _ in range(2):
        watcher.begin()
        watcher.wait()
    assert known == [UNASKED, (None, MountsLook(1))]
    assert watcher.looks == (MountsLook(1), MountsLook(3))


def check_sorting(found: list[L], columns: tuple[Column[L], ...]) -> None:
    large, unknown, small = found
    for number, column in enumerate(columns):
        up = ordered(found, columns, View(sort=number))
        backwards = ordered([small, unknown, large], columns, View(sort=number, reverse=True))
        assert up == backwards[::-1]
        assert up.index(large) < up.index(small) or not column.numeric
        assert column.key in column.heading.lower()
    keys = [column.key for column in columns]
    assert len({*keys, *"q ?+-\t"}) == len(keys) + 6


def test_once_is_for_scripts(
    segment: "_native.Segment", capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    segment.client("web1").new_pool(persistent=True)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["top", "--once", "--interval", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "web1" in out
    assert "quit" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert run(["top", "--count", "3", "-d", "0.1"]) == 0
    assert capsys.readouterr().out.count("tmem default") == 3
    assert run(["top", "--once", "-d", "0.1", "--table", "clients"]) == 0
    assert "PUT99" in capsys.readouterr().out
    assert run(["top", "--once", "--count", "2"]) == 2
    assert run(["top", "--interval", "0"]) == 2


class Terminal:
    """A terminal of 80 columns with ``tmem top`` in it, by tmux."""

    def __init__(self, socket: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket)]
        self.run(
            "-f",
            os.devnull,
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            f"unset COLUMNS LINES; {sys.executable} -m tmem top -d 0.2; echo status $?; read x",
        )

    def run(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True).stdout

    def press(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def screen(self) -> str:
        return self.run("capture-pane", "-p")


@pytest.fixture
def terminal(segment: "_native.Segment", tmp_path: Path) -> Iterator[Terminal]:
    for name in ("aaa", "bbb"):
        segment.client(name).new_pool(persistent=True).put(
            bytes(OID_SIZE), 0, os.urandom((30 if name == "bbb" else 10) * PAGE_SIZE)
        )
    terminal = Terminal(tmp_path / "tmux")
    yield terminal
    subprocess.run([*terminal._tmux, "kill-server"], check=False)


def test_in_a_terminal_with_keys(
    terminal: Terminal, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    def order() -> list[str]:
        return re.findall(r"^(aaa|bbb)\b", terminal.screen(), re.MULTILINE)

    eventually(lambda: order() == ["aaa", "bbb"], what="a first frame")
    assert "quit" in terminal.screen()
    terminal.press("m")
    eventually(lambda: order() == ["bbb", "aaa"], what="by memory")
    terminal.press("m")
    eventually(lambda: order() == ["aaa", "bbb"], what="the other way round")
    terminal.press("Left")
    eventually(lambda: order() == ["bbb", "aaa"], what="by data")
    terminal.press("?")
    eventually(lambda: "Any key goes back" in terminal.screen())
    terminal.press("x", "Tab")
    eventually(lambda: "PUT99" in terminal.screen(), what="the table of clients")
    terminal.press("p")
    eventually(lambda: order() == ["aaa", "bbb"])
    terminal.press("Tab")
    eventually(lambda: "no mounts" in terminal.screen(), what="the table of mounts")
    terminal.press("Tab")
    eventually(lambda: "RATIO" in terminal.screen(), what="the table of pools again")
    terminal.press("Space")
    eventually(lambda: "paused" in terminal.screen())
    terminal.press("Space", "+")
    eventually(lambda: "every 0.4 s" in terminal.screen() and "paused" not in terminal.screen())
    terminal.run("resize-window", "-x", "110", "-y", "30")
    eventually(lambda: "STATE" in terminal.screen())
    segment.client("ccc")
    eventually(lambda: "ccc" in terminal.screen(), what="a client that is new")
    terminal.press("q")
    eventually(lambda: "status 0" in terminal.screen())


def test_it_ends_with_the_segment_and_leaves_the_terminal_as_it_was(
    terminal: Terminal, segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    from tmem.backends import _native as core

    eventually(lambda: "aaa" in terminal.screen())
    core.destroy(segment.path)
    eventually(lambda: "status 1" in terminal.screen())
    assert "was destroyed" in terminal.screen()
    terminal.press("visible")
    eventually(lambda: "visible" in terminal.screen())  # what is typed is shown again
