"""Mistakes that people make: each gets one line that says what to do, status 1 or 2, and nothing is lost.

One process for all of them, as far as that goes. What else can be wrong with a configuration, a mount option
or a tier's URL has its own tests; here every command is met by what can be wrong with its world.
"""

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.backends import service
from tmem.backends.paths import SegmentPaths
from tmem.cli.main import COMMANDS, run
from tmem.types import OID_SIZE, PAGE_SIZE

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native

Mistake = tuple[str, int, str]
"""A command line, the exit status, and what the message has to say."""

UUID = "6c1f0b2e-54a4-4c63-8a5e-0f7e9d1c2b3a"
START = "start it with 'tmem --name default start -d'"
CREATE = "create it with 'tmem --name default start -d'"


@pytest.fixture
def check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[list[Mistake] | tuple[Mistake, ...]], None]:
    """Make mistakes, ``{t}`` in their words for a directory, and fail with all that are not told well."""

    def all_of(mistakes: list[Mistake] | tuple[Mistake, ...]) -> None:
        wrong = []
        for line, status, said in mistakes:
            found = run([word.replace("{t}", str(tmp_path)) for word in line.split()])
            _, err = capsys.readouterr()
            if complaint := _complaint(err, found, status, said.replace("{t}", str(tmp_path))):
                wrong.append(f"tmem {line}: {complaint}: {err!r}")
        assert not wrong, "\n".join(wrong)

    return all_of


def _complaint(err: str, found: int, status: int, said: str) -> str:
    """Return what is wrong with how a mistake was told, nothing if it was told well."""
    lines = err.splitlines()
    if found != status:
        return f"status {found}, not {status}"
    if said not in err:
        return f"it does not say {said!r}"
    if any(one in err for one in ("Traceback", "[Errno", "fault of tmem")):
        return "not for people"
    if status == 2:
        return "" if lines[-1].startswith("Error: ") else "no usage error"
    told = len(lines) == 1 and lines[0].startswith("tmem: ") and ": tmem: " not in lines[0]
    return "" if told else "not one line"


USAGE = (
    ("lst", 2, "did you mean 'list'?"),
    ("nonsense", 2, "'tmem --help' lists them"),
    ("swap ad", 2, "'add'"),
    ("--name a/b list", 1, "'a/b' is no segment name: use up to 63 letters"),
    ("--config {t}/none start -d", 1, "there is no configuration {t}/none: make it"),
    ("--config {t} start -d", 1, "{t} cannot be read: Is a directory"),
    ("swap add w --size bad", 2, "such as 512M"),
    ("swap add w --size 1000", 1, "give a multiple of 4096 bytes"),
    ("swap add ../w --size 64M", 1, "is no client name"),
    ("swap add w --size 64M --tcp nonsense", 2, "write HOST:PORT"),
    ("swap add w --size 64M --tcp 127.0.0.1:70000", 2, "write HOST:PORT"),
    ("swap add w --size 64M --unix /x --tcp 127.0.0.1:1", 2, "either --unix or --tcp"),
    ("swap add w --size 64M --tcp 127.0.0.1:1 --tls-psk {t}/none", 1, "make one with psktool"),
    ("swap add w --size 64M --tcp 127.0.0.1:1 --tls-psk /dev/null", 1, "line USER:KEY"),
    ("swap add w --size 64M --priority 5", 2, "go with --attach"),
    ("start -d --memory x", 2, "such as 512M"),
    ("start -d --memory 2G..1G", 2, "write it as 1G..2G"),
    ("start -d --memory 1M", 1, "use at least 8M"),
    ("start -d --memory 1000T", 1, "use at most"),
    ("start -d --condense 200", 2, "0<=x<=100"),
    ("start -d --condense-level 0", 2, "1<=x<=19"),
    ("start -d --condense-level high", 2, "'high' is not a valid integer"),
    ("start -d --metrics abc", 2, "write HOST:PORT"),
    ("list a b", 2, "extra argument"),
    ("top --interval 1000", 2, "0.1<=x<=60"),
    ("top --table x", 2, "'mounts'"),
    ("resize x", 2, "such as 512M"),
    ("metrics", 2, "give HOST:PORT, or --once"),
    ("set w", 2, "say what to set"),
    ("set w --weight 70000", 2, "0<=x<=65535"),
    ("set w --compress gzip", 2, "'lz4'"),
    ("authorise w nouuid", 2, "write 32 hexadecimal digits"),
    ("freeze", 2, "say which client, or --all"),
    ("off w --all", 2, "say which client, or --all"),
    ("flush w --size x", 2, "such as 512M"),
    ("shrink w --to x", 2, "such as 512M"),
    ("destroy", 2, "say which client, or --all"),
    ("restore f --as a/b", 1, "is no client name"),
    ("handoff w", 2, "either --to or --through"),
    ("handoff w --through '", 2, "no command line"),
    ("handoff w --to default", 2, "already"),
    ("contain --share x=200", 2, "write GROUP=PERCENT"),
    ("contain --force", 2, "--force goes with --undo"),
    ("balloon --stalled 0", 2, "0<x<=100"),
    ("balloon no-such-group", 1, "name a group below"),
    ("bench --only x", 2, "'density'"),
    ("bench --json {t}/none/x --dry-run", 1, "give another file"),
    ("install --root {t}/none --dry-run", 1, "make it, or leave out --root"),
    ("install --command relative --dry-run", 1, "give --command the whole path"),
    ("umount {t}/none", 1, "'findmnt -t fuse.tmem' lists them"),
    ("mount {t}", 2, "name two directories"),
    ("mount {t}/none {t}", 1, "name the directory whose files are to be cached"),
    ("mount /etc/hostname {t}", 1, "name the directory whose files are to be cached"),
    ("mount {t} {t}/none", 1, "{t}/none is inside {t}"),
    ("mount /usr {t}/none", 1, "make the directory first"),
    ("mount /usr /etc/hostname", 1, "make one to mount on"),
    ("mount /usr {t} -o nonsense", 1, "'nonsense' is no mount option: use client=NAME"),
    ("mount --restart", 2, "--restart takes mount points"),
    ("mount --restart {t}", 1, "'findmnt -t fuse.tmem' lists them"),
)


def test_of_words(check: Callable[..., None], runtime_dir: Path) -> None:
    check(USAGE)
    assert [*runtime_dir.iterdir()] == []


NOTHING_THERE = (
    ("stop", 1, START),
    ("restart", 1, CREATE),
    ("swap add w --size 64M", 1, CREATE),
    ("swap remove w", 1, CREATE),
    ("swap serve w", 1, "there is no swap device w: make it with"),
    ("list", 1, CREATE),
    ("top --once", 1, CREATE),
    ("resize 64M", 1, CREATE),
    ("freeable", 1, CREATE),
    ("metrics --once", 1, CREATE),
    ("metrics 127.0.0.1:9753", 1, CREATE),
    ("set w --weight 3", 1, CREATE),
    (f"authorise w {UUID}", 1, CREATE),
    *((f"{verb} w", 1, CREATE) for verb in ("freeze", "thaw", "off", "on", "flush", "shrink", "destroy")),
    ("destroy --all", 1, "nothing to destroy"),
    ("save {t}/save", 1, CREATE),
    ("restore {t}/none", 1, "give a file that 'tmem save' has written"),
    ("handoff w --to other", 1, CREATE),
)
LOCAL = {"mount", "umount", "contain", "balloon", "watermarks", "doctor", "bench", "install"}
"""Commands that need no segment."""


def test_without_a_segment(check: Callable[..., None], runtime_dir: Path) -> None:
    check(NOTHING_THERE)
    assert [*runtime_dir.iterdir()] == []
    met = {line.split()[0] for line, _, _ in NOTHING_THERE}
    assert {*COMMANDS} - met - LOCAL == {"start", "receive"}  # receive reads what only handoff writes


@pytest.fixture
def manager(tmem: Tmem) -> Iterator[SegmentPaths]:
    """A segment of 64 MiB whose manager runs."""
    assert tmem("start", "-d", "--memory", "64M").status == 0
    paths = SegmentPaths.of("default")
    yield paths
    with contextlib.suppress(OSError):
        for record in paths.state.glob("swap-*.json"):
            tmem("swap", "remove", record.stem.removeprefix("swap-"))
    tmem("stop")


NO_CLIENT = tuple(
    (f"{line}", 1, "has no client 'x': see 'tmem")
    for line in ("list x", "set x --weight 3", f"authorise x {UUID}", "freeze x", "thaw x", "off x", "on x")
) + tuple(
    (f"{line}", 1, "has no client 'x': see 'tmem")
    for line in ("flush x", "destroy x", "save {t}/new --client x", "handoff x --to other")
)
NO_MANAGER = (
    ("stop", 1, START),
    ("restart", 1, START),
    ("swap add w --size 16M", 1, START),
    ("swap remove w", 1, "there is no swap device w"),
    ("shrink w", 1, "there is no swap device w"),
    ("resize 4M", 1, "use that or more"),
    ("resize 1G", 1, "use at most that"),
    ("set w --floor 1G", 1, "w cannot be promised 1G now, at most 5"),
    ("set w --tier {t}/none/x --tier-size 1G", 1, "make it first"),
    ("set w --tier {t}/plain --tier-size 1M", 1, "it stays as it is; give another path"),
    ("set w --tier http://x", 1, "or a redis:// URL"),
    ("set w --tier {t}", 2, "--tier-size SIZE"),
    ("set w --tier {t} --tier-size 1K", 1, "give 64K to 1T"),
    (f"authorise w {UUID} --revoke", 1, "shows what it may"),
    ("save {t}/plain", 1, "give another name, or --force"),
    ("save {t}/none/f", 1, "make it, or give another name"),
    ("save {t}", 1, "give another name, or -"),
    ("restore {t}", 1, "give the save file in it"),
    ("restore {t}/plain", 1, "was not written by tmem"),
    ("restore /dev/null", 1, "is empty"),
    ("handoff w --through false", 1, "stays in segment 'default'"),
    ("handoff w --through {t}/none", 1, "cannot be run"),
    ("handoff w --to other", 1, "there is no segment 'other': create it"),
    ("start -d --memory 128M", 1, "leave out --memory"),
    ("metrics 127.0.0.1:{port}", 1, "choose another address"),
    ("metrics no.such.host.invalid:9753", 1, "choose another address"),
)


def test_without_a_manager(
    check: Callable[..., None], segment: "_native.Segment", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = segment.client("w").new_pool(persistent=True)
    page = random.Random(5).randbytes(PAGE_SIZE)
    pool.put(bytes(OID_SIZE), 7, page)
    (tmp_path / "plain").write_bytes(b"precious" * 1000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        check(NO_CLIENT + tuple((line.replace("{port}", port), *rest) for line, *rest in NO_MANAGER))
    assert (tmp_path / "plain").read_bytes() == b"precious" * 1000
    kept = bytearray(PAGE_SIZE)
    assert pool.get(bytes(OID_SIZE), 7, kept)
    assert kept == page
    assert run(["save", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    whole = (tmp_path / "whole").read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "twice": whole * 2,
    }.items():
        (tmp_path / name).write_bytes(content)
    check(
        (
            ("restore {t}/cut --as z", 1, "ends early, at byte"),
            ("restore {t}/flipped --as z", 1, "is damaged at byte"),
            ("restore {t}/twice --as z", 1, "give them one at a time"),
            ("restore {t}/whole", 1, "has 'w' already"),
            ("restore {t}/whole --client x", 1, "it has 'w'"),
        )
    )
    assert [client.name for client in segment.clients()] == ["w"]


def test_where_the_manager_should_be(
    check: Callable[..., None], segment: "_native.Segment", eventually: Callable[..., None]
) -> None:
    """A socket that nobody listens at, a file, a directory, and somebody who talks nonsense."""
    paths = SegmentPaths.of("default")
    paths.state.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(paths.control))
    check((("stop", 1, START),))
    paths.control.unlink()
    paths.control.write_text("a file")
    check((("stop", 1, START),))
    paths.control.unlink()
    code = (
        "import os, socket, sys\nlistening = socket.socket(socket.AF_UNIX)\n"
        "listening.bind(sys.argv[1] + '.new')\n"
        "listening.listen()\nos.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "while True:\n    one = listening.accept()[0]\n    one.recv(99)\n"
        "    one.sendall(sys.argv[2].encode() + b'\\n')\n    one.close()\n"
    )
    for answer in ("nonsense", "[]", '{"pid": "x"}'):
        with subprocess.Popen([sys.executable, "-c", code, str(paths.control), answer]) as talker:
            try:
                eventually(paths.control.is_socket)
                check((("stop", 1, "sent no answer that this version understands"),))
                assert run(["list"]) == 0
            finally:
                talker.kill()
        paths.control.unlink()


def test_what_is_no_segment(check: Callable[..., None], runtime_dir: Path) -> None:
    place = runtime_dir / "default"
    lines = ("list", "top --once", "set w --weight 1", "start -d", "swap add w --size 16M", "destroy w")
    for content in (b"", b"hello", random.Random(1).randbytes(100_000)):
        place.write_bytes(content)
        check([(line, 1, "is not a tmem segment; name another file") for line in lines])
        assert place.read_bytes() == content
    place.unlink()
    place.mkdir()
    check([(line, 1, "is no file, and so no segment: move it away") for line in (*lines, "destroy --all")])
    place.rmdir()
    target = runtime_dir / "target"
    target.write_bytes(b"precious")
    place.symlink_to(target)
    check([(line, 1, "is no file, and so no segment: move it away") for line in (*lines, "destroy --all")])
    assert target.read_bytes() == b"precious"


def test_with_a_manager(check: Callable[..., None], manager: SegmentPaths, tmp_path: Path) -> None:
    """Above all: a file that somebody names as the socket stays, and so do those who listen there."""
    (tmp_path / "plain").write_bytes(b"precious")
    with (
        socket.socket(socket.AF_UNIX) as listening,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        listening.bind(str(tmp_path / "live"))
        listening.listen()
        check(
            (
                ("swap add w --size 16M --unix {t}/plain", 1, "is there, and no socket: give another --unix"),
                ("swap add w --size 16M --unix {t}", 1, "is there, and no socket: give another --unix"),
                ("swap add w --size 16M --unix {t}/live", 1, "another program listens on {t}/live"),
                ("swap add w --size 16M --unix {t}/none/s", 1, "there is no directory {t}/none"),
                (f"swap add w --size 16M --unix /{'x' * 120}", 1, "up to 107 bytes"),
                (
                    f"swap add w --size 16M --tcp 127.0.0.1:{taken.getsockname()[1]}",
                    1,
                    "Address already in use. Give another --tcp",
                ),
                ("start -d --metrics 127.0.0.1:1", 1, "then start it again"),
                ("list w", 1, "has no client 'w'"),  # nothing is left of any of them
            )
        )
    assert (tmp_path / "plain").read_bytes() == b"precious"
    # A socket that somebody has left is no obstacle.
    assert run(["swap", "add", "w", "--size", "16M", "--unix", str(tmp_path / "live")]) == 0
    check(
        (
            ("swap add w --size 32M", 1, "remove it first with tmem swap remove w"),
            ("destroy w", 1, "take it away with 'tmem --name default swap remove w' first"),
            ("destroy --all", 1, "take it away with 'tmem --name default swap remove w' first"),
            ("swap serve w", 1, "runs already"),
            ("shrink w", 1, "is not swap of this machine"),
            ("handoff w --to other", 1, "start it with 'tmem --name other start -d'"),
        )
    )
    for damaged in ("", "[]", "nonsense"):
        manager.record("swap", "v").write_text(damaged)
        check(
            [(f"{line} v", 1, "is damaged or not of this version") for line in ("swap remove", "swap serve")]
        )
    manager.record("swap", "v").unlink()
    pid, _ = service.ping(manager)
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([ended], [], [], 60)[0]
    os.close(ended)
    check((("swap add v --size 16M", 1, START), ("stop", 1, START)))
    assert run(["start", "-d"]) == 0
    assert run(["swap", "remove", "w"]) == 0


@pytest.mark.usefixtures("root", "manager")
def test_names_that_are_no_plain_text(tmem: Tmem, tmp_path: Path) -> None:
    """A mount point of any bytes, and other commands while one is there."""
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "file").write_text("text")
    for name in (b"m\xff\xfe", b"return\rof the carriage", "line\nend \u0085\u2003 back\\slash".encode()):
        place = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        Path(place).mkdir()
        mounted = tmem("mount", str(lower), place, "-o", "client=odd")
        assert (mounted.status, mounted.err) == (0, "")
        try:
            assert Path(place, "file").read_text() == "text"
            for line in ("list", "swap add w --size 16M", "metrics --once", "contain --dry-run"):
                assert run(line.split()) == 0, line
            run(["doctor"])
            refused = tmem("destroy", "odd")
            assert refused.status == 1
            assert "is mounted: unmount it with 'tmem umount " in refused.err
        finally:
            ended = tmem("umount", place)
        assert (ended.status, ended.err) == (0, "")


@pytest.mark.usefixtures("root", "segment")
def test_as_another_user(runtime_dir: Path, tmp_path: Path) -> None:
    """By setpriv(1), as somebody who may look at the directory and no more."""
    runtime_dir.chmod(0o755)
    (tmp_path / "secret").mkdir(mode=0o700)
    for line, said in {
        "list": "belongs to user 0: run this as that user or as root",
        "start -d": "belongs to user 0: run this as that user or as root",
        f"save {tmp_path}/secret/x": "belongs to user 0: run this as that user or as root",
        "destroy --all": "run this as its user or as root",
        "contain": "run this as root, or with --dry-run",
        "watermarks": "run this as root, or with --dry-run",
        "balloon x": "run this as root, or with --dry-run",
        f"--config {tmp_path}/secret/x swap add w --size 16M": "run this as its user",
        "swap add w --size 16M": "run this as that user or as root",
        f"restore {tmp_path}/secret/x": "cannot be read (Permission denied)",
    }.items():
        as_nobody = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "tmem"]
        done = subprocess.run(
            [*as_nobody, *line.split()], capture_output=True, text=True, check=False, cwd="/"
        )
        assert not _complaint(done.stderr, done.returncode, 1, said), (line, done)


def test_what_nobody_thought_of_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    """A null byte, which no shell can pass on, stands for the mistakes of ours that are still there."""
    assert run(["umount", "a\0b"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tmem: this is a fault of tmem (ValueError: embedded null byte)")
    monkeypatch.setenv("TMEM_DEBUG", "1")
    with pytest.raises(ValueError, match="null byte"):
        run(["umount", "a\0b"])
