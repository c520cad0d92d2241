"""Opens that are answered below Python: only the usual ones, as Python would, and Python learns of them."""

import errno
import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from tmem.fs import syscalls
from tmem.fs.acting import Caller
from tmem.fs.identity import object_id, version_of
from tmem.fs.options import Cache
from tmem.fs.policy import Policy
from tmem.fs.reading import ASKED, NEWS, NOTHING, REQUEST
from tmem.fs.rules import Rules

from ..waiting import wait_until
from .native_mount import (
    CONTENT,
    DIRECT_IO,
    FORGET,
    KEEP_CACHE,
    NO_FLUSH,
    OPEN,
    RELEASE,
    Maker,
    Mount,
    make,
)

STATFS, INTERRUPT = 17, 36
FAN_CLASS_CONTENT, FAN_MARK_ADD, FAN_OPEN_PERM = 4, 1, 0x10000


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    yield from make(tmp_path)


@pytest.fixture
def wake() -> Iterator[int]:
    descriptor = os.eventfd(0)
    yield descriptor
    os.close(descriptor)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def mount(maker: Maker) -> Mount:
    return maker()


@pytest.fixture
def node(mount: Mount) -> int:
    """A file that was never opened, in a mount that opens are granted in."""
    mount.grant()
    return mount.look_up("file")


def test_a_first_open_is_answered_as_python_would(mount: Mount, node: int) -> None:
    asked, handle, said = mount.open(node)
    assert (asked, said) == (False, NO_FLUSH)  # the kernel may keep what it reads, but not what it has
    assert mount.doubts == [node]  # an old size must not cut reads
    file = mount.files()[handle]
    state = mount.inode(node).state
    status = (mount.lower / "file").stat()
    assert state is not None
    assert file.state is state
    assert (
        state.name
        == state.oid
        == mount.overlay._name_of(
            (status.st_dev, status.st_ino), mount.overlay.table.handle(mount.inode(node)), file.descriptor
        )
    )
    assert (state.version, state.size) == (version_of(status), len(CONTENT))
    assert (state.served, state.takes, state.quiet) == (True, True, True)
    assert os.path.samestat(os.fstat(file.descriptor), status)
    assert file.caller == Caller(0, 5, os.getpid())
    assert mount.inode(node).opens == 1
    assert mount.read(node, handle) == CONTENT
    assert state.reach == 3
    assert mount.close(node, handle)  # Python knows it
    assert (mount.inode(node).opens, mount.files()) == (0, {})


def test_what_python_would_make_of_it_is_the_same(mount: Mount, node: int) -> None:
    """The same file, opened by both: equal names and versions, and the second finds the first one's pages."""
    _, handle, _ = mount.open(node)
    assert mount.read(node, handle) == CONTENT
    learned = mount.inode(node).state
    assert learned is not None
    mount.close(node, handle)
    mount.overlay.table.opens.grant(0, 0, False, True)
    asked, handle, said = mount.open(node)
    assert (asked, said) == (True, KEEP_CACHE | NO_FLUSH)
    assert mount.inode(node).state is learned
    before = mount.reading.reader.counters()["hit_pages"]
    assert mount.read(node, handle) == CONTENT
    assert mount.reading.reader.counters()["hit_pages"] == before + 3


def test_later_opens_are_answered_and_leave_nothing(mount: Mount, node: int) -> None:
    first = mount.open(node)[1]
    mount.close(node, first)
    descriptors = open_descriptors()
    for _ in range(200):
        mount.request(OPEN, node, struct.pack("=II", os.O_RDONLY, 0))
        assert mount.reading.reader.serve(-1, 0) == NOTHING + NEWS  # there is news, which nobody looks at
        handle, said, _ = struct.unpack("=QIi", mount.answer()[1])
        assert said == KEEP_CACHE | NO_FLUSH
        mount.request(RELEASE, node, struct.pack("=QIIQ", handle, 0, 0, 0))
        assert mount.reading.reader.serve(-1, 0) == NOTHING  # and is none any more
        assert mount.answer() == (0, b"")
    assert open_descriptors() == descriptors
    assert mount.files() == {}
    counters = mount.reading.reader.counters()
    assert (counters["opens"], counters["closes"]) == (201, 200)


def test_direct_files_are_told_so(maker: Maker) -> None:
    mount = maker(cache=Cache.DIRECT)
    mount.grant()
    node = mount.look_up("file")
    assert mount.open(node) == (False, 1, DIRECT_IO | NO_FLUSH)
    assert mount.open(node) == (False, 2, DIRECT_IO | NO_FLUSH)
    assert mount.doubts == []


def test_handles_are_given_out_once(mount: Mount, node: int) -> None:
    """Whoever gives them out; and more are open at a time than Python may leave unlearned."""
    handles = []
    for turn in range(150):
        flags = os.O_RDONLY if turn % 10 else os.O_RDONLY | os.O_APPEND
        mount.request(OPEN, node, struct.pack("=II", flags, 0))
        event = mount.reading.reader.serve(-1, 0)  # learned of late
        if event % NEWS == ASKED:
            mount.reading._learn()
            mount.reading.answer(lambda *arguments: pytest.fail("it waits"))
        handles.append(struct.unpack_from("=Q", mount.answer()[1])[0])
    mount.reading._learn()
    assert sorted(mount.files()) == sorted(set(handles))
    assert len(handles) == 150 == mount.inode(node).opens
    for handle in handles:
        mount.close(node, handle)
    assert mount.inode(node).opens == 0


def test_only_while_it_is_granted(mount: Mount) -> None:
    node = mount.look_up("file")
    assert mount.open(node)[0]  # which grants further ones
    assert not mount.open(node)[0]
    mount.overlay.table.opens.grant(1e-6, 0, False, True)
    assert mount.open(node)[0]


@pytest.mark.parametrize(
    "flags",
    [os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_NOATIME, os.O_RDONLY | os.O_SYNC, os.O_RDONLY | os.O_APPEND],
)
def test_unusual_opens_are_pythons(mount: Mount, node: int, flags: int) -> None:
    mount.use(node)
    asked, handle, _ = mount.open(node, flags)
    assert asked
    assert mount.files()[handle].writable == (flags & os.O_ACCMODE != os.O_RDONLY)
    mount.close(node, handle)


def test_a_file_that_has_changed_is_pythons(mount: Mount, node: int) -> None:
    path = mount.lower / "file"
    mount.use(node)
    assert not mount.use(node)
    stamps = path.stat()
    with path.open("r+b") as file:  # the same size, and the old mtime
        file.write(b"changed")
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    asked, handle, said = mount.open(node)
    assert (asked, said) == (True, NO_FLUSH)
    assert mount.read(node, handle).startswith(b"changed")
    mount.close(node, handle)
    assert not mount.use(node)


def test_a_young_version_is_not_trusted_where_stamps_are_coarse(maker: Maker) -> None:
    mount = maker(fine_stamps=False)
    mount.grant()
    (mount.lower / "file").touch()
    node = mount.look_up("file")
    assert not mount.use(node)
    assert mount.use(node)


def test_a_file_that_is_written_meanwhile_is_not_trusted(maker: Maker) -> None:
    mount = maker()
    mount.grant()
    node = mount.look_up("file")
    with (mount.lower / "file").open("r+b"):
        asked, handle, _ = mount.open(node)
        assert not asked
        state = mount.inode(node).state
        assert state is not None
        assert state.version is None
        mount.close(node, handle)
        assert mount.use(node)
    assert mount.use(node)  # which finds nobody there, and a version
    assert not mount.use(node)


def test_own_changes_and_reports_are_heard_of(mount: Mount, node: int) -> None:
    mount.use(node)
    inode = mount.inode(node)
    state = inode.state
    assert state is not None
    with mount.overlay.coherence.change(state, inode.descriptor):
        assert mount.use(node)
    assert mount.use(node)  # it was opened meanwhile, so nothing of it is trusted until the next open
    assert not mount.use(node)
    (mount.lower / "file").touch()
    mount.overlay.coherence.reported(state, inode.descriptor)
    assert mount.use(node)
    assert not mount.use(node)
    mount.overlay.coherence.distrust(state)
    assert mount.use(node)
    assert mount.use(node) is False  # what it opens from now on is read past the pool
    assert not state.takes


def test_what_is_remembered_of_a_forgotten_file_is_used(mount: Mount, node: int) -> None:
    _, handle, _ = mount.open(node)
    assert mount.read(node, handle) == CONTENT
    mount.close(node, handle)
    mount.request(FORGET, node, struct.pack("=Q", 1))
    assert mount.served()
    again = mount.look_up("file")
    before = mount.reading.reader.counters()["hit_pages"]
    asked, handle, said = mount.open(again)
    assert (asked, said) == (True, KEEP_CACHE | NO_FLUSH)
    assert mount.read(again, handle) == CONTENT
    assert mount.reading.reader.counters()["hit_pages"] == before + 3
    mount.close(again, handle)
    assert not mount.use(again)


def test_what_was_there_before_a_first_open_is_dropped(mount: Mount, node: int) -> None:
    """Pages of a file of which nothing is known are never served."""
    status = (mount.lower / "file").stat()
    handle = mount.overlay.table.handle(mount.inode(node))
    name = object_id(status.st_dev, status.st_ino, handle)
    pool = mount.overlay.precache.current
    assert pool is not None
    assert pool.put(name, 0, b"old " * 1024 * 3) == 3
    asked, opened, _ = mount.open(node)
    assert not asked
    assert mount.read(node, opened) == CONTENT


def test_a_node_that_became_another_file_is_not_mistaken(mount: Mount, node: int) -> None:
    mount.use(node)
    inode = mount.inode(node)
    assert inode.state is not None
    mount.overlay.table.opens.know(node, inode.key[0], inode.key[1] + 1, inode.state.gate)
    assert mount.use(node)
    mount.overlay.table.opens.forget(node)


@pytest.mark.parametrize("rules", [Rules(skip_files=("*.no",)), Rules(least_bytes=1)])
def test_rules_are_pythons(maker: Maker, rules: Rules) -> None:
    mount = maker(Policy(rules=rules))
    mount.grant()
    node = mount.look_up("file")
    assert mount.use(node)
    assert mount.use(node)


def test_empty_and_declined_files_are_pythons(mount: Mount, node: int) -> None:
    (mount.lower / "empty").touch()
    assert mount.use(mount.look_up("empty"))
    mount.use(node)
    mount.overlay._worth._aside_until = float("inf")
    mount.overlay.table.opens.grant(0, 0, False, True)
    asked, handle, _ = mount.open(node)
    assert asked
    assert mount.inode(node).declined
    mount.overlay._worth._aside_until = None
    mount.grant()
    assert mount.open(node)[0]  # as long as one is declined all are
    assert mount.inode(node).opens == 2
    assert handle in mount.files()


def test_a_lease_of_somebody_else_is_waited_for_in_python(mount: Mount, node: int) -> None:
    """The lease is broken by the open that Python makes, as by any program's."""
    file = os.open(mount.lower / "file", os.O_RDWR)
    broken: list[int] = []

    def give_way(*_: object) -> None:
        broken.append(1)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    before = signal.signal(signal.SIGIO, give_way)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        asked, handle, _ = mount.open(node)
    finally:
        signal.signal(signal.SIGIO, before)
        os.close(file)
    assert asked
    assert broken
    mount.close(node, handle)


def test_a_file_without_a_name_loses_its_pages_with_its_last_close(mount: Mount, node: int) -> None:
    _, first, _ = mount.open(node)
    assert mount.read(node, first) == CONTENT
    mount.close(node, first)
    mount.request(OPEN, node, struct.pack("=II", os.O_RDONLY, 0))
    assert mount.reading.reader.serve(-1, 0) == NOTHING + NEWS
    handle = struct.unpack_from("=Q", mount.answer()[1])[0]
    (mount.lower / "file").unlink()
    pool = mount.overlay.precache.current
    assert pool is not None
    assert pool.statistics()["pages"] == 3
    assert mount.close(node, handle)
    assert pool.statistics()["pages"] == 0


@pytest.mark.parametrize("which", ["first", "later"])
def test_times_from_beyond_2262_are_pythons(maker: Maker, which: str) -> None:
    """Whoever owns a file can give it a time of which 64 bits of nanoseconds know nothing."""
    mount = maker()
    path = mount.lower / "file"
    node = mount.look_up("file")
    if which == "later":
        mount.use(node)
    os.utime(path, (13_000_000_001, 13_000_000_000))
    assert path.stat().st_mtime_ns > 1 << 63
    mount.grant()
    for said in (NO_FLUSH, KEEP_CACHE | NO_FLUSH):
        asked, handle, told = mount.open(node)
        assert (asked, told) == (True, said)
        assert mount.read(node, handle) == CONTENT
        mount.close(node, handle)
    state = mount.inode(node).state
    assert state is not None
    assert state.version == version_of(path.stat())


def test_what_is_asked_between_two_requests_is_pythons(mount: Mount, node: int) -> None:
    """Others read requests while Python is at one: of what was opened then it would not know at the next."""
    (mount.lower / "other").write_bytes(CONTENT)
    other = mount.look_up("other")
    opens = ((other, os.O_RDWR), (node, os.O_RDONLY), (node, os.O_RDWR))
    for which, flags in opens:
        mount.request(OPEN, which, struct.pack("=II", flags, 0))
    wait_until(mount.taken)  # by the stand-in, which may still be about to give the last one to Python
    answered = 0

    def all_answered() -> bool:
        nonlocal answered
        if mount.reading.serve(-1, 0) == ASKED:
            answered += mount.reading.answer(lambda *arguments: pytest.fail("it waits"))
        # Where Python takes 2 ms for one, what is left is looked at by the reader, and told to Python, first.
        return answered + mount.reading.reader.counters()["opens"] == len(opens)

    wait_until(all_answered)
    assert sorted(mount.files()) == [1, 2, 3]
    assert mount.files()[2].state is mount.files()[3].state is mount.inode(node).state


def test_who_is_killed_while_an_open_hangs_ends_at_once(
    mount: Mount, node: int, program: "subprocess.Popen[bytes]"
) -> None:
    """Local file systems may have somebody asked first, who looks for viruses, say."""
    scanner = syscalls.fanotify_init(FAN_CLASS_CONTENT, os.O_RDONLY | os.O_CLOEXEC)
    syscalls.fanotify_mark(scanner, FAN_MARK_ADD, FAN_OPEN_PERM, -1, os.fsencode(mount.lower / "file"))
    with ThreadPoolExecutor(1) as pool:
        unique = mount.request(OPEN, node, struct.pack("=II", os.O_RDONLY, 0), program.pid)
        serving = pool.submit(mount.reading.serve, -1, 0)
        try:
            scanned = struct.unpack_from("=IBBHQii", os.read(scanner, 4096))[5]
            program.send_signal(signal.SIGQUIT)
            mount.request(INTERRUPT, 0, struct.pack("=Q", unique))
            assert struct.unpack_from("=iQ", mount.kernel.recv(1 << 20), 4) == (-errno.EINTR, unique)
            assert not serving.done()
            os.close(scanned)
        finally:
            os.close(scanner)
        assert serving.result() == REQUEST
    (handle,) = mount.files()
    assert struct.unpack_from("=Q", os.read(mount.reading._session, 1 << 20), 40) == (handle,)
    trio.run(mount.overlay.release, handle)


@pytest.mark.parametrize("other", ["a request for libfuse", "trio"])
def test_others_have_their_turn_however_many_opens_others_read(
    mount: Mount, node: int, other: str, wake: int
) -> None:
    """Helpers may bring more as long as there are programs that open files."""
    opens = 60
    mount.use(node)
    before = mount.reading.reader.counters()["opens"]
    if other == "trio":
        os.eventfd_write(wake, 1)
    else:
        mount.request(STATFS, 1, b"")
    for _ in range(opens):
        mount.request(OPEN, node, struct.pack("=II", os.O_RDONLY, 0))
    wait_until(mount.taken)  # by the stand-in
    assert mount.reading.serve(wake, 1000) == (NOTHING if other == "trio" else REQUEST)
    assert 0 < mount.reading.reader.counters()["opens"] - before < opens
    os.read(wake if other == "trio" else mount.reading._session, 1 << 20)
    wait_until(lambda: mount.reading.serve(wake, 0) == NOTHING and len(mount.files()) == opens)


def test_without_memory_for_an_open_file_none_stays(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    node = mount.look_up("file")
    descriptors = open_descriptors()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(mount.reading, "open", fail)
    assert mount.refused(node) == errno.ENOMEM
    assert (mount.files(), mount.inode(node).opens) == ({}, 0)
    assert open_descriptors() == descriptors
    monkeypatch.undo()
    assert mount.use(node)


def test_saved_files_are_all_that_are_open(mount: Mount, node: int) -> None:
    _, first, _ = mount.open(node)
    _, second, _ = mount.open(node)
    saved = mount.overlay.saved()
    assert [row[0] for row in saved["files"]] == [first, second]
    assert saved["next_file"] == second + 1


def test_a_file_is_not_forgotten_before_python_has_learned_of_it(mount: Mount, node: int) -> None:
    """The table of inodes forgets by itself what Python has not seen."""
    mount.request(OPEN, node, struct.pack("=II", os.O_RDONLY, 0))
    mount.request(FORGET, node, struct.pack("=Q", 1))
    assert mount.served()
    assert mount.reading.reader.counters()["opens"] == 1
    assert len(mount.files()) == 1
    assert len(mount.overlay.table) == 1
