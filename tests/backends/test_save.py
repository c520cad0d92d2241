"""Save and restore: everything comes back as it was, or nothing comes and the reason is said."""

import io
import os
import random
import tempfile
import threading
from collections.abc import Callable
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
from .saving import Pages, get_all, persistent, put_all, restored, saved, source, target
from .streams import Stream, client, raw_record

EDGES = (0, 1, 15, 16, 63, 64, 511, 512, 4095, 4096, 2**20 - 1, 2**20, 2**31, MAX_INDEX - 1, MAX_INDEX)
UUID = bytes(range(16))

__all__ = ["source", "target"]


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


def test_a_client_that_begins_again_is_the_second_one(target: _native.Segment) -> None:
    stream = Stream("one")
    for number in (1, 2):
        stream.document(Kind.CLIENT, client(), number)
        stream.data(raw_record(number, page("text", number)), number)
        stream.document(Kind.CLIENT_DROPPED if number == 1 else Kind.CLIENT_END, client(), number)
    restored(target, stream.end())
    found = persistent(target)
    assert get_all(found, {(bytes(24), 1): b"", (bytes(24), 2): b""}) == {(bytes(24), 2): page("text", 2)}


def test_a_corrupt_page_is_not_saved_as_if_it_were_sound(source: _native.Segment, directory: Path) -> None:
    data = b"needle" + page("random", 1)[6:]
    put_all(source.client("one").new_pool(persistent=True), {(oid(1), 1): data})
    at = (directory / "source").read_bytes().index(data)
    with flipped(directory / "source", at, 0):
        with pytest.raises(CorruptPageError, match=r"'one' cannot be saved.*--client names the others"):
            saved(source)
        assert source.client("one").phase == "none"


# -- while clients work


def test_a_save_is_one_moment_of_a_client_that_works(
    source: _native.Segment,
    directory: Path,
    workers: list[Worker],
    effort: int,
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    """Every page is as the same moment left it: what a write that waited has written is not there."""
    source.client("one").new_pool(persistent=True)
    worker = workers[0]
    worker.attach(directory / "source")
    later = 0
    for turn in range(5 * effort):
        begun, enough = directory / f"begun {turn}", directory / f"enough {turn}"
        worker.start(snapshots.work, turn, begun, enough)
        eventually(begun.exists)
        with tempfile.TemporaryFile() as file:
            (done,) = save.save(source, "source", file.fileno())
            file.seek(0)
            target = _native.create(str(directory / f"target {turn}"), 32 << 20)
            save.restore(target, "target", file.fileno(), "the file")
        enough.touch()
        count = worker.finish(snapshots.work)
        assert done.rounds > 2
        assert 0 < snapshots.verify(target, turn) <= count
        assert snapshots.verify(source, turn) == count
        later += snapshots.verify(target, turn) < count
        target.close()
        _native.destroy(str(directory / f"target {turn}"))
    assert later


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


def test_any_number_of_clients_may_end_meanwhile(source: _native.Segment, target: _native.Segment) -> None:
    """Each took a block with it that its pages were to go to: after three the save waited for ever."""
    names = [f"client{number}" for number in range(5)]
    for name in names:
        put_all(source.client(name).new_pool(persistent=True), {(oid(1), 1): page("text", 1)})
    left = [source.client(name) for name in reversed(names[:4])]
    saved: list[bytes] = []
    meddler = Meddler(lambda: left.pop().destroy(), 4)
    thread = threading.Thread(target=lambda: saved.append(save_with(source, meddler)), daemon=True)
    thread.start()
    thread.join(40)
    assert saved
    assert restored(target, saved[0]).clients == (names[4],)


def test_a_client_that_ends_before_its_turn_is_left_out(
    source: _native.Segment, target: _native.Segment
) -> None:
    """The file said "forget it" of a client of which it had said nothing, and could not be restored."""
    for name in ("one", "two", "zoe"):
        put_all(source.client(name).new_pool(persistent=True), {(oid(1), 1): page("text", 1)})
    content = save_with(source, Meddler(source.client("two").destroy, 1))
    with pytest.raises(
        SaveFileError, match="no client 'two', which ended while it was saved: choose another"
    ):
        restored(target, content, "two")
    assert restored(target, content).clients == ("one", "zoe")


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
