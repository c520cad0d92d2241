"""What cannot be restored is said in one line, and leaves nothing."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tmem.backends import _native
from tmem.backends.savefile import Kind
from tmem.errors import SaveFileError

from .pages import oid, page
from .saving import put_all, restored, saved, source, target
from .streams import Stream, client, parts, pool, raw_record

__all__ = ["source", "target"]


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
    with pytest.raises(SaveFileError, match="'one' was promised 16M, and segment 'target' can promise 4M"):
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


def test_a_client_that_is_dropped_and_never_began(target: _native.Segment) -> None:
    """As files have it that were written when a client had ended before its turn."""
    stream = Stream("one", "two")
    stream.document(Kind.CLIENT_DROPPED)
    stream.document(Kind.CLIENT, client("two"), 2)
    stream.document(Kind.CLIENT_END, client("two"), 2)
    assert restored(target, stream.end()).clients == ("two",)


def test_totals_that_do_not_fit(target: _native.Segment) -> None:
    stream = Stream("one")
    stream.document(Kind.END, {"clients": 0, "frames": 7, "data_bytes": 0}, 0)
    with pytest.raises(SaveFileError, match="totals"):
        restored(target, stream.value)


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
