"""Save and restore: everything comes back as it was, or nothing comes and the reason is said."""

import io
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tmem.backends import _native, save
from tmem.backends.copying import ClientCopy, Spool
from tmem.backends.savefile import Kind
from tmem.backends.saverecords import Header, Totals
from tmem.backends.streams import FrameOutput
from tmem.errors import CorruptPageError, PoolError, SaveFileError
from tmem.types import MAX_INDEX, PAGE_SIZE

from . import snapshots
from .conftest import flipped
from .model import check_identities
from .pages import KINDS, oid, page
from .places import Worker
from .streams import Stream, client, parts, pool, raw_record

EDGES = (0, 1, 15, 16, 63, 64, 511, 512, 4095, 4096, 2**20 - 1, 2**20, 2**31, MAX_INDEX - 1, MAX_INDEX)
UUID = bytes(range(16))
Pages = dict[tuple[bytes, int], bytes]


@pytest.fixture
def source(directory: Path) -> Iterator[_native.Segment]:
    yield from _segment(directory / "source", 32 << 20)


@pytest.fixture
def target(directory: Path) -> Iterator[_native.Segment]:
    yield from _segment(directory / "target", 32 << 20)


def _segment(path: Path, size_bytes: int) -> Iterator[_native.Segment]:
    made = _native.create(str(path), size_bytes)
    yield made
    assert made.check() == []
    made.close()


def saved(source: _native.Segment, *names: str) -> bytes:
    """Save clients of `source`; the file's content."""
    with tempfile.TemporaryFile() as file:
        save.save(source, "source", file.fileno(), names)
        file.seek(0)
        return file.read()


def restored(
    target: _native.Segment, content: bytes, *names: str, called: str | None = None
) -> save.Restored:
    """Restore clients of a save file with that content."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        return save.restore(target, "target", file.fileno(), "the file", names, called)


def put_all(pool: _native.Pool, pages: Pages) -> None:
    for (object_id, index), data in pages.items():
        assert pool.put(object_id, index, data) == 1


def get_all(pool: _native.Pool, pages: Pages) -> Pages:
    """Return what is there of the handles of `pages`."""
    found = {}
    buffer = bytearray(PAGE_SIZE)
    for object_id, index in pages:
        if pool.get(object_id, index, buffer):
            found[object_id, index] = bytes(buffer)
    return found


def persistent(segment: _native.Segment, name: str = "one") -> _native.Pool:
    (found,) = [pool for pool in segment.client(name, create=False).pools() if pool.persistent]
    return found


def test_nothing_is_saved_and_restored(source: _native.Segment, target: _native.Segment) -> None:
    assert restored(target, saved(source)) == save.Restored((), 0, 0)
    assert target.clients() == []


@pytest.mark.parametrize("number", [0, 1, 2, 3, 1000])
def test_any_number_of_pages(source: _native.Segment, target: _native.Segment, number: int) -> None:
    """Historic defect 10.8: the first page of a pool was skipped, and one page alone lost."""
    pages = {(oid(1), index): page("text", index) for index in range(number)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    assert restored(target, saved(source)).records == number
    pool = persistent(target)
    assert get_all(pool, pages) == pages
    assert pool.statistics()["pages"] == number


def test_every_kind_of_page_at_every_edge_of_the_index(
    source: _native.Segment, target: _native.Segment
) -> None:
    pages = {
        (oid(number), index): page(kind, number * 100 + at)
        for number, kind in enumerate(KINDS)
        for at, index in enumerate(EDGES)
    }
    put_all(source.client("one").new_pool(persistent=True), pages)
    restored(target, saved(source))
    pool = persistent(target)
    assert get_all(pool, pages) == pages
    counts, before = pool.statistics(), persistent(source).statistics()
    assert counts["pages"] == counts["puts"] == counts["puts_stored"] == len(pages)
    check_identities(counts)
    for name in ("fill_pages", "raw_pages", "compressed_pages", "bytes", "objects"):
        assert counts[name] == before[name], name
    assert [pool.present(oid(0), index, 1) for index in EDGES] == [[(index, 1)] for index in EDGES]


def test_sixteen_pools_in_any_order(source: _native.Segment, target: _native.Segment) -> None:
    one = source.client("one")
    numbers = list(range(16))
    random.Random(3).shuffle(numbers)
    for number in numbers:
        made = one.new_pool(persistent=number % 3 > 0, exclusive=number % 2 == 0, id=number)
        put_all(made, {(oid(number), index): page("text", number) for index in range(number)})
    restored(target, saved(source))
    found = {made.id: made for made in target.client("one", create=False).pools()}
    assert sorted(found) == list(range(16))
    for number, made in found.items():
        assert (made.persistent, made.exclusive) == (number % 3 > 0, number % 2 == 0)
        assert made.statistics()["pages"] == (number if made.persistent else 0)
        if made.persistent:
            wanted: Pages = {(oid(number), index): page("text", number) for index in range(number)}
            assert get_all(made, wanted) == wanted


def test_settings_of_a_client(source: _native.Segment, target: _native.Segment) -> None:
    one = source.client("one")
    pages: Pages = {(oid(1), index): page("random", index) for index in range(200)}
    put_all(one.new_pool(persistent=True), pages)
    other = bytes(16 * [7])
    one.authorise(UUID)
    one.authorise(other)
    one.new_pool(persistent=False, uuid=UUID, id=9)
    one.weight, one.cap_bytes, one.floor_bytes, one.compress = 31, 100 * PAGE_SIZE, 64 * PAGE_SIZE, "none"
    one.mode = "frozen"
    restored(target, saved(source))
    got = target.client("one", create=False)
    assert (got.weight, got.cap_bytes, got.floor_bytes) == (31, 100 * PAGE_SIZE, 64 * PAGE_SIZE)
    assert (got.compress, got.mode, got.phase) == ("none", "frozen", "none")
    assert sorted(got.authorised()) == sorted([UUID, other])
    # More than the cap allows now was there before, and a freeze refuses puts: neither lost a page.
    assert get_all(persistent(target), pages) == pages
    shared = got.pool(9)
    assert (shared.uuid, shared.exclusive, shared.persistent) == (UUID, False, False)


def test_a_client_that_is_off_keeps_its_persistent_pages(
    source: _native.Segment, target: _native.Segment
) -> None:
    pages: Pages = {(oid(1), 5): page("text", 1)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    source.client("one").mode = "off"
    restored(target, saved(source))
    assert target.client("one").mode == "off"
    assert get_all(persistent(target), pages) == pages


def test_ephemeral_pools_begin_empty_and_shared_ones_are_joined(
    source: _native.Segment, target: _native.Segment
) -> None:
    one = source.client("one")
    one.authorise(UUID)
    for made in (one.new_pool(persistent=False), one.new_pool(persistent=False, uuid=UUID)):
        put_all(made, {(oid(1), 1): page("text", 1)})
    there = target.client("there")
    there.authorise(UUID)
    shared = there.new_pool(persistent=False, uuid=UUID)
    put_all(shared, {(oid(2), 2): page("text", 2)})
    restored(target, saved(source))
    private, joined = target.client("one").pools()
    assert private.statistics()["pages"] == 0
    assert {sharer.name for sharer in shared.sharers} == {"one", "there"}
    assert get_all(joined, {(oid(2), 2): b""}) == {(oid(2), 2): page("text", 2)}


def test_chosen_clients_and_another_name(source: _native.Segment, target: _native.Segment) -> None:
    for number, name in enumerate(("one", "two", "three")):
        put_all(source.client(name).new_pool(persistent=True), {(oid(1), 1): page("text", number)})
    everything = saved(source)
    assert restored(target, everything, "two", "one").clients == ("one", "two")
    assert restored(target, everything, "three", called="four").clients == ("four",)
    assert get_all(persistent(target, "four"), {(oid(1), 1): b""}) == {(oid(1), 1): page("text", 2)}
    with pytest.raises(SaveFileError, match="has 'one', 'three', 'two': choose the one to rename"):
        restored(target, everything, called="five")
    with pytest.raises(SaveFileError, match="has no client 'none': it has 'one', 'three', 'two'"):
        restored(target, everything, "none")
    with pytest.raises(PoolError, match="has no client 'none'"):
        saved(source, "none", "one")
    part = saved(source, "three", "three")
    assert restored(target, part, called="five").clients == ("five",)


def test_clients_that_exist_are_named(source: _native.Segment, target: _native.Segment) -> None:
    for name in ("one", "two", "three"):
        source.client(name)
    target.client("one")
    target.client("three")
    with pytest.raises(SaveFileError, match="has 'one', 'three' already: destroy what is there"):
        restored(target, saved(source))
    assert sorted(found.name for found in target.clients()) == ["one", "three"]


def test_too_small_a_segment_is_told_at_once(source: _native.Segment, directory: Path) -> None:
    pages = {(oid(1), index): page("random", index) for index in range(4000)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    small = _native.create(str(directory / "small"), 8 << 20)
    with pytest.raises(
        SaveFileError,
        match=r"does not fit into segment 'target' .*: it needs about 1[56].*M, and 6.*M are left",
    ):
        restored(small, saved(source))
    assert (small.clients(), small.check()) == ([], [])
    small.close()


def test_memory_that_runs_out_on_the_way_leaves_nothing(source: _native.Segment, directory: Path) -> None:
    """The header promises less than there is: only the pages themselves show it."""
    stream = Stream("one", "two")
    for number, name in enumerate(("one", "two"), 1):
        stream.document(Kind.CLIENT, client(name), number)
        for index in range(0, 1500, 100):
            records = b"".join(raw_record(index + at, page("random", index + at)) for at in range(100))
            stream.data(records, number)
        stream.document(Kind.CLIENT_END, client(name), number)
    small = _native.create(str(directory / "small"), 8 << 20)
    with pytest.raises(SaveFileError, match="does not fit into segment 'target'"):
        restored(small, stream.end())
    assert (small.clients(), small.statistics()["persistent_pages"]) == ([], 0)
    small.reap()
    assert small.check() == []
    small.client("one").new_pool(persistent=True)  # the name is free
    small.close()


def test_a_floor_that_cannot_be_promised_there(source: _native.Segment, directory: Path) -> None:
    source.client("one").floor_bytes = 16 << 20
    small = _native.create(str(directory / "small"), 8 << 20)
    with pytest.raises(SaveFileError, match="'one' was promised 16M, which segment 'target' cannot"):
        restored(small, saved(source))
    assert (small.clients(), small.check()) == ([], [])
    small.close()


def test_a_segment_that_is_frozen_says_so(source: _native.Segment, target: _native.Segment) -> None:
    source.client("one")
    content = saved(source)
    target.mode = "frozen"
    with pytest.raises(SaveFileError, match="segment 'target' is frozen: thaw it first"):
        restored(target, content)


def wrong_streams() -> dict[str, bytes]:
    """Streams that are sound frame by frame and cannot be all the same."""

    def stream(*frames: Callable[[Stream], None], purpose: str = "save", **header: object) -> bytes:
        made = Stream("one", purpose=purpose, **header)
        for frame in frames:
            frame(made)
        return made.end()

    def begin(made: Stream, **changes: object) -> None:
        made.document(Kind.CLIENT, {**client(), **changes})

    def end(made: Stream, **changes: object) -> None:
        made.document(Kind.CLIENT_END, {**client(), **changes})

    def data(made: Stream, records: bytes = raw_record(1, page("text", 1)), pool: int = 0) -> None:
        made.data(records, pool=pool)

    return {
        "no end of the client": stream(begin, data),
        "an end without a beginning": stream(end),
        "pages before the client": stream(data, begin, end),
        "a client twice": stream(begin, begin, end),
        "another client's end": stream(begin, lambda s: end(s, name="two")),
        "pages of a pool that is not there": stream(begin, lambda s: data(s, pool=1), end),
        "another pool in the end": stream(begin, lambda s: end(s, pools=[pool(id=1)])),
        "a pool of another version": stream(lambda s: begin(s, pools=[pool(flags=1)]), end),
        "records cut short": stream(begin, lambda s: data(s, raw_record(1, page("text", 1))[:-1]), end),
        "no records at all": stream(begin, lambda s: data(s, b"x" * 100), end),
        "a frame of a handoff": stream(begin, lambda s: s.document(Kind.SYNC), end),
        "a second header": stream(lambda s: s.document(Kind.HEADER, {}, 0), begin, end),
        "another machine's bytes": stream(begin, end, byteorder="big"),
        "another size of pages": stream(begin, end, page_size=65536),
        "a handoff": stream(begin, end, purpose="handoff"),
        "a strange header": stream(begin, end, colour="red"),
    }


@pytest.mark.parametrize("name", wrong_streams())
def test_a_stream_that_cannot_be(target: _native.Segment, name: str) -> None:
    with pytest.raises(SaveFileError, match=r"the file .*; |the file .*: use"):
        restored(target, wrong_streams()[name])
    assert (target.clients(), target.statistics()["persistent_pages"]) == ([], 0)


def test_totals_that_do_not_fit(target: _native.Segment) -> None:
    stream = Stream("one")
    stream.document(Kind.END, {"clients": 0, "frames": 7, "data_bytes": 0}, 0)
    with pytest.raises(SaveFileError, match="totals"):
        restored(target, stream.value)


def test_a_client_that_begins_again_is_the_second_one(target: _native.Segment) -> None:
    stream = Stream("one")
    for number in (1, 2):
        stream.document(Kind.CLIENT, client(), number)
        stream.data(raw_record(number, page("text", number)), number)
        stream.document(Kind.CLIENT_DROPPED if number == 1 else Kind.CLIENT_END, client(), number)
    restored(target, stream.end())
    found = persistent(target)
    assert get_all(found, {(bytes(24), 1): b"", (bytes(24), 2): b""}) == {(bytes(24), 2): page("text", 2)}


def test_damage_anywhere_restores_nothing(source: _native.Segment, target: _native.Segment) -> None:
    for name in ("one", "two"):
        pages = {(oid(1), index): page("text", index) for index in range(100)}
        put_all(source.client(name).new_pool(persistent=True), pages)
    content, rng = saved(source), random.Random(9)
    places = [rng.randrange(len(content)) for _ in range(60)]
    for at in [*places, *(part.start for part in parts(content)), *(part.end - 1 for part in parts(content))]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(SaveFileError, match="the file "):
            restored(target, bytes(damaged))
        with pytest.raises(SaveFileError, match="the file "):
            restored(target, content[:at])
        assert target.clients() == []
    assert target.statistics()["persistent_pages"] == 0
    assert restored(target, content).clients == ("one", "two")


def test_a_corrupt_page_is_not_saved_as_if_it_were_sound(source: _native.Segment, directory: Path) -> None:
    data = b"needle" + page("random", 1)[6:]
    put_all(source.client("one").new_pool(persistent=True), {(oid(1), 1): data})
    at = (directory / "source").read_bytes().index(data)
    with flipped(directory / "source", at, 0):
        with pytest.raises(CorruptPageError):
            saved(source)
        assert source.client("one").phase == "none"


# -- while clients work


def test_a_save_is_one_moment_of_a_client_that_works(
    source: _native.Segment, directory: Path, workers: list[Worker], effort: int
) -> None:
    """Every page is as the same moment left it: what a write that waited has written is not there."""
    source.client("one").new_pool(persistent=True)
    worker = workers[0]
    worker.attach(directory / "source")
    moments = []
    for turn in range(5 * effort):
        worker.start(snapshots.work, turn, 20000)
        with tempfile.TemporaryFile() as file:
            (done,) = save.save(source, "source", file.fileno())
            file.seek(0)
            target = _native.create(str(directory / f"target {turn}"), 32 << 20)
            save.restore(target, "target", file.fileno(), "the file")
        assert done.rounds > 2
        moments.append(snapshots.verify(target, turn))
        assert worker.finish(snapshots.work) == 20000
        assert snapshots.verify(source, turn) == 20000
        target.close()
        _native.destroy(str(directory / f"target {turn}"))
    assert any(0 < moment < 20000 for moment in moments), moments


class Meddler:
    """Does something to the source when the copy of a client is under way, a few times."""

    def __init__(self, action: Callable[[], None], times: int) -> None:
        self.action = action
        self.times = times

    def __call__(self, done_bytes: int, all_bytes: int) -> None:
        if self.times:
            self.times -= 1
            self.action()


def save_with(source: _native.Segment, meddler: Meddler, *names: str) -> bytes:
    with tempfile.TemporaryFile() as file:
        save.save(source, "source", file.fileno(), names, meddler)
        file.seek(0)
        return file.read()


def test_a_pool_that_comes_or_goes_meanwhile_is_saved_as_it_is_in_the_end(
    source: _native.Segment, target: _native.Segment
) -> None:
    one = source.client("one")
    put_all(one.new_pool(persistent=True, id=0), {(oid(1), 1): page("text", 1)})

    def replace() -> None:
        one.pool(0).destroy()
        put_all(one.new_pool(persistent=True, id=0), {(oid(1), 2): page("text", 2)})
        put_all(one.new_pool(persistent=True, id=4), {(oid(1), 3): page("text", 3)})

    restored(target, save_with(source, Meddler(replace, 1)))
    found = {pool.id: pool for pool in target.client("one").pools()}
    wanted: Pages = {(oid(1), index): b"" for index in (1, 2, 3)}
    assert get_all(found[0], wanted) == {(oid(1), 2): page("text", 2)}
    assert get_all(found[4], wanted) == {(oid(1), 3): page("text", 3)}
    assert one.phase == "none"


def test_pools_that_never_stay_are_given_up(source: _native.Segment) -> None:
    one = source.client("one")
    put_all(one.new_pool(persistent=True, id=0), {(oid(1), 1): page("text", 1)})

    def toggle() -> None:
        if 1 in {pool.id for pool in one.pools()}:
            one.pool(1).destroy()
        else:
            one.new_pool(persistent=True, id=1)

    with pytest.raises(SaveFileError, match="'one' changes its pools all the time"):
        save_with(source, Meddler(toggle, 1000))
    assert one.phase == "none"


def test_a_client_that_ends_meanwhile_is_left_out(source: _native.Segment, target: _native.Segment) -> None:
    for name in ("one", "two"):
        put_all(source.client(name).new_pool(persistent=True), {(oid(1), 1): page("text", 1)})
    content = save_with(source, Meddler(source.client("one").destroy, 1))
    assert restored(target, content).clients == ("two",)


def test_a_client_that_was_asked_for_and_ends_is_an_error(source: _native.Segment) -> None:
    put_all(source.client("one").new_pool(persistent=True), {(oid(1), 1): page("text", 1)})
    with pytest.raises(SaveFileError, match="client 'one' cannot be saved"):
        save_with(source, Meddler(source.client("one").destroy, 1), "one")


def test_a_client_that_departed_is_not_saved(source: _native.Segment) -> None:
    one = source.client("one")
    for step in ("copy", "freeze", "depart"):
        one.handoff(step)
    with pytest.raises(SaveFileError, match=r"'one' departed in a handoff .* 'tmem thaw one --force'"):
        saved(source)
    one.handoff("end")
    assert saved(source)


def test_an_error_of_the_file_thaws_the_client(source: _native.Segment) -> None:
    pages = {(oid(1), index): page("random", index) for index in range(3000)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        save.save(source, "source", writer)
    os.close(writer)
    assert source.client("one").phase == "none"
    assert get_all(persistent(source), pages) == pages


def test_more_changes_than_there_is_memory_for_are_in_order(
    source: _native.Segment, target: _native.Segment, tmp_path: Path
) -> None:
    """A spool that overflows writes what it has first; one that does not, writes later."""
    pool = source.client("one").new_pool(persistent=True)
    for rounds in (1, 2, 5):
        with (tmp_path / "file").open("w+b") as file:
            out = FrameOutput(file.fileno())
            out.document(Kind.HEADER, 0, Header.here("save", "source", (), "").document())
            with ClientCopy(source.client("one"), 1, out, lambda: None) as copy:
                spool = Spool(out, 4 << 20)
                for number in range(rounds):
                    pages = {(oid(1), index): page("random", number + index) for index in range(700)}
                    put_all(pool, pages)
                    copy.round(spool)
                assert spool.overflowed == (rounds > 1)
                pool.flush(oid(1), 3)
                copy.freeze(spool)
            spool.empty()
            copy.end()
            out.drain()
            out.document(Kind.END, 0, Totals(1, out.frames, out.data_bytes).document())
            out.close()
            file.seek(0)
            save.restore(target, "target", file.fileno(), "the file")
        del pages[oid(1), 3]
        assert get_all(persistent(target), {**pages, (oid(1), 3): b""}) == pages
        target.client("one").destroy()


# -- the file


def test_a_file_appears_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with save.target(path) as descriptor:
        os.write(descriptor, b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), save.target(path, force=True) as descriptor:
        os.write(descriptor, b"content" * (1 // 0))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_exists_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with (
        pytest.raises(SaveFileError, match="exists already: give another name, or --force"),
        save.target(path),
    ):
        pytest.fail("not reached")
    with save.target(path, force=True) as descriptor:
        os.write(descriptor, b"after")
    assert path.read_bytes() == b"after"


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(SaveFileError, match="exists already"), save.target(path):
        path.write_bytes(b"quicker")
    assert path.read_bytes() == b"quicker"


def test_what_a_killed_save_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"much more than is written now")
    with save.target(tmp_path / "file") as descriptor:
        os.write(descriptor, b"short")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_two_saves_to_one_file(tmp_path: Path) -> None:
    with (
        save.target(tmp_path / "file"),
        pytest.raises(SaveFileError, match="is being written by another save"),
        save.target(tmp_path / "file"),
    ):
        pytest.fail("not reached")
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "no ordinary file"), ("none/file", "No such file"), ("fifo", "no ordinary file")],
    ids=["a directory", "nowhere", "a FIFO"],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SaveFileError, match=reason), save.target(tmp_path / name, force=True):
        pytest.fail("not reached")


def test_a_full_disk_is_said_and_leaves_nothing(source: _native.Segment, root: None, tmp_path: Path) -> None:
    pages = {(oid(1), index): page("random", index) for index in range(1000)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmem-test", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        with (
            pytest.raises(SaveFileError, match="cannot be written: No space left"),
            save.target(disk / "file") as descriptor,
        ):
            save.save(source, "source", descriptor)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert source.client("one").phase == "none"


def test_a_stream_restores_as_a_file_does(source: _native.Segment, target: _native.Segment) -> None:
    pages = {(oid(1), index): page("text", index) for index in range(3000)}
    put_all(source.client("one").new_pool(persistent=True), pages)
    content = io.BytesIO(saved(source))
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.close(reader)
            while piece := content.read(4321):
                os.write(writer, piece)
        finally:
            os._exit(0)
    os.close(writer)
    assert save.restore(target, "target", reader, "the stream").records == 3000
    os.close(reader)
    os.wait()
    assert get_all(persistent(target), pages) == pages
