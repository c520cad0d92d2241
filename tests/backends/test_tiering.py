"""Tiers that are given to clients, changed and taken away: whoever maps the segment finds them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tmem.backends import _native, tiering
from tmem.backends.paths import SegmentPaths
from tmem.errors import CorruptPageError, TierDownError, TierError

from .departed import NPAGES, OID, data, demote, got
from .tiers.faulty import Faults, FaultyTier
from .tiers.memory import MemoryWorld


class Wrapped:
    """A client, of which tests replace methods."""

    def __init__(self, client: _native.Client) -> None:
        self.client = client

    def __getattr__(self, name: str) -> object:
        return getattr(self.client, name)

    @property
    def tiered(self) -> bool:
        return self.client.tiered

    @tiered.setter
    def tiered(self, value: bool) -> None:
        self.client.tiered = value

    @property
    def itself(self) -> _native.Client:
        return cast("_native.Client", self)


@pytest.fixture
def paths(small: _native.Segment) -> SegmentPaths:
    path = Path(small.path)
    paths = SegmentPaths(path.name, path.parent)
    paths.state.mkdir()
    return paths


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a spill.file"


@pytest.fixture
def spilled(
    persistent: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
) -> Iterator[_native.Pool]:
    tiering.assign(paths, small, persistent.client, str(file), 4 << 20)
    persistent.put(OID, 0, b"".join(data()))
    url = tiering.of(paths, persistent.client)
    assert url is not None
    writer = tiering.open_tier(url, tiering.identity(small, persistent.client), writer=True)
    writer.retain([])
    assert demote(persistent.client, FaultyTier(writer, Faults())) == NPAGES
    yield persistent
    writer.close()


def test_every_mapping_finds_it(spilled: _native.Pool, small: _native.Segment) -> None:
    other = _native.attach(small.path)
    assert got(other.client("guest").pools()[0], 0, NPAGES) == data()
    other.close()
    assert got(spilled, 0, NPAGES) == data()


def test_a_file_that_was_cut_off_is_an_error(spilled: _native.Pool, file: Path) -> None:
    assert got(spilled, 0, NPAGES) == data()
    os.truncate(file, 20 * 4096)
    with pytest.raises(CorruptPageError):
        got(spilled, NPAGES - 1, 1)
    assert got(spilled, 0, 5) == data()[:5]


def test_a_file_that_was_written_over_is_an_error(spilled: _native.Pool, file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(8192)
        opened.write(os.urandom(file.stat().st_size - 8192))
    os.sync()
    bad = 0
    for n in range(NPAGES):
        try:
            assert got(spilled, n, 1) == data()[n : n + 1]
        except CorruptPageError:
            bad += 1
    assert bad > NPAGES - 10


def test_a_file_that_is_no_more_is_an_error_for_who_comes_late(
    spilled: _native.Pool, small: _native.Segment, file: Path
) -> None:
    assert got(spilled, 0, 1) == data()[:1]
    file.unlink()
    assert got(spilled, 1, NPAGES - 1) == data()[1:]  # who has it open still reads
    other = _native.attach(small.path)
    other.tier_patience_ms = 50
    with pytest.raises(TierDownError):
        got(other.client("guest").pools()[0], 0, 1)
    other.close()


def test_a_file_in_use_is_not_given_to_another(
    spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
) -> None:
    other = small.client("other")
    with pytest.raises(TierError, match="pages of another client"):
        tiering.assign(paths, small, other, str(file), 1 << 20)
    with pytest.raises(TierError, match="has the tier"):
        tiering.assign(paths, small, spilled.client, f"{file}2", 1 << 20)
    assert tiering.assign(paths, small, spilled.client, str(file), 1) == tiering.of(paths, spilled.client)
    assert got(spilled, 0, NPAGES) == data()


def test_withdrawn_it_is_gone_and_another_may_come(
    spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
) -> None:
    left: list[int] = []
    tiering.withdraw(paths, small, spilled.client, left.append)
    assert left[0] == NPAGES
    assert spilled.statistics()["tier_pages"] == 0
    assert tiering.of(paths, spilled.client) is None
    (ended,) = tiering.ended_tiers(paths)  # the writer still has it
    assert file.exists()
    tiering.assign(paths, small, spilled.client, f"{file}2", 4 << 20)
    url = tiering.of(paths, spilled.client)
    assert url is not None
    writer = tiering.open_tier(url, tiering.identity(small, spilled.client), writer=True)
    writer.retain([])
    assert demote(spilled.client, FaultyTier(writer, Faults())) == NPAGES
    assert got(spilled, 0, NPAGES) == data()
    writer.close()
    assert ended.link.is_symlink()


def test_another_client_has_the_file_of_one_that_is_no_more(
    spilled: _native.Pool,
    small: _native.Segment,
    paths: SegmentPaths,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not while its writer still has it, for which the manager gets some time."""
    monkeypatch.setattr(tiering, "_ENDING_S", 0.2)
    spilled.client.destroy()
    again = small.client("guest")
    with pytest.raises(TierDownError, match="in use by another manager"):
        tiering.assign(paths, small, again, str(file), 1 << 20)
    assert file.exists()
    assert not again.tiered


def test_the_same_file_again_without_a_manager(
    small: _native.Segment, client: _native.Client, paths: SegmentPaths, file: Path
) -> None:
    tiering.assign(paths, small, client, str(file), 1 << 20)
    client.destroy()
    again = small.client("guest")
    tiering.assign(paths, small, again, str(file), 2 << 20)
    assert file.stat().st_size == 2 << 20
    assert [one.serial for one in tiering.assigned_tiers(paths)] == [again.serial]


def test_two_withdrawn_one_after_the_other_are_both_removed(
    spilled: _native.Pool,
    small: _native.Segment,
    paths: SegmentPaths,
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, second = spilled.client, file.with_name("second")
    tiering.withdraw(paths, small, client)
    tiering.assign(paths, small, client, str(second), 1 << 20)
    writer = tiering.open_tier(f"file:{second}", tiering.identity(small, client), writer=True)
    tiering.withdraw(paths, small, client)
    assert len(list(tiering.ended_tiers(paths))) == 2
    writer.close()
    tiering.end_all(paths, small.nonce)
    assert not second.exists()
    assert file.exists()  # whose writer still has it
    assert len(list(tiering.ended_tiers(paths))) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(
        f"what was stored in file:{str(file).replace(' ', '%20')} stays there, and "
        "nobody needs it: remove it by hand"
    )


def test_another_tier_comes_while_one_is_opened(
    spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
) -> None:
    """A server has read where the tier is and is slow to open it, and that is not where the pages are."""
    client = spilled.client
    second = file.with_name("second")

    class Slow(Wrapped):
        """The client, whose tier is another one when it is opened."""

        def attach_tier(self, found: str, *epoch: int) -> None:
            tiering.withdraw(paths, small, client)
            tiering.assign(paths, small, client, str(second), 4 << 20)
            writer = tiering.open_tier(f"file:{second}", tiering.identity(small, client), writer=True)
            writer.retain([])
            assert demote(client, FaultyTier(writer, Faults())) == NPAGES
            writer.close()
            client.attach_tier(found, *epoch)

    assert tiering.attach(small, Slow(client).itself)
    assert got(spilled, 0, NPAGES) == data()


@pytest.mark.parametrize("other", ["fails", "again"])
def test_nothing_goes_there_between_the_last_look_and_the_end(
    persistent: _native.Pool,
    small: _native.Segment,
    paths: SegmentPaths,
    file: Path,
    other: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command has found nothing in the tier; before it takes that away, another one gives it back, and
    the manager goes on."""
    monkeypatch.setattr(tiering, "_ALONE_S", 0.1)
    client = persistent.client
    tiering.assign(paths, small, client, str(file), 4 << 20)
    writer = tiering.open_tier(f"file:{file}", tiering.identity(small, client), writer=True)
    writer.retain([])
    persistent.put(OID, 0, b"".join(data()))

    class Failing(Wrapped):
        """For a command that cannot bring back all that is there."""

        def live(self, timeout_ms: int) -> bytes:
            return bytes(8)

        def promote(self, hand: int, most: int) -> tuple[int, int]:
            raise TierDownError("it does not answer")

    class Slow(Wrapped):
        """For one that is stopped just as it has found nothing any more."""

        looks = 0

        def live(self, timeout_ms: int) -> bytes | None:
            found = client.live(timeout_ms)
            self.looks += 1
            if self.looks > 2:
                return found
            with contextlib.suppress(TierDownError):
                if other == "fails":
                    tiering.withdraw(paths, small, Failing(client).itself)
                else:
                    tiering.assign(paths, small, client, str(file), 4 << 20)
            if client.tiered:
                demote(client, FaultyTier(writer, Faults()))
            return found

    tiering.withdraw(paths, small, Slow(client).itself)
    writer.close()
    assert client.statistics()["tier_pages"] == 0
    assert not client.tiered
    again = _native.attach(small.path)
    assert got(again.client("guest").pools()[0], 0, NPAGES) == data()
    again.close()


def test_interrupted_the_client_keeps_its_tier(
    spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths
) -> None:
    """With what came back in memory, and demotion going on."""

    def interrupt(left_pages: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiering.withdraw(paths, small, spilled.client, interrupt)
    assert spilled.client.tiered
    assert tiering.of(paths, spilled.client) is not None


def test_an_end_that_comes_late_removes_nothing_else(
    small: _native.Segment, client: _native.Client, paths: SegmentPaths, file: Path
) -> None:
    """The manager has seen that a tier ended, and gets to it when the client has it again."""
    tiering.assign(paths, small, client, str(file), 1 << 20)
    held = tiering.open_tier(f"file:{file}", tiering.identity(small, client), writer=True)
    tiering.withdraw(paths, small, client)
    (ended,) = tiering.ended_tiers(paths)
    held.close()
    tiering.assign(paths, small, client, str(file), 1 << 20)
    tiering.end(small, ended)
    assert file.stat().st_size == 1 << 20


def test_without_a_state_directory_nothing_is_made(
    small: _native.Segment, client: _native.Client, paths: SegmentPaths, file: Path
) -> None:
    paths.state.rmdir()
    with pytest.raises(TierError, match="start -d' makes it if it is gone"):
        tiering.assign(paths, small, client, str(file), 1 << 20)
    assert not file.exists()


def test_a_link_that_is_gone_is_made_again(
    spilled: _native.Pool, small: _native.Segment, paths: SegmentPaths, file: Path
) -> None:
    """The state directory was removed, with what told where the pages are; they wait to be found."""
    client = spilled.client
    (link,) = [one.link for one in tiering.assigned_tiers(paths)]
    link.unlink()
    with pytest.raises(TierError, match="has pages in another tier"):
        tiering.assign(paths, small, client, f"{file}2", 4 << 20)
    assert tiering.assign(paths, small, client, str(file), 1 << 20) == tiering.of(paths, client)
    assert got(spilled, 0, NPAGES) == data()


def test_a_link_to_a_server_that_is_gone_is_made_again(
    persistent: _native.Pool,
    small: _native.Segment,
    paths: SegmentPaths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, worlds = persistent.client, {"redis://one": MemoryWorld(), "redis://other": MemoryWorld()}
    monkeypatch.setattr(tiering, "open_tier", lambda url, who, writer: worlds[url].open(who, writer))
    tiering.assign(paths, small, client, "redis://one", 0)
    persistent.put(OID, 0, b"".join(data()))
    writer = tiering.open_tier("redis://one", tiering.identity(small, client), writer=True)
    assert demote(client, FaultyTier(writer, Faults())) == NPAGES
    (link,) = [one.link for one in tiering.assigned_tiers(paths)]
    link.unlink()
    with pytest.raises(TierError, match="has pages in another tier"):
        tiering.assign(paths, small, client, "redis://other", 0)
    tiering.assign(paths, small, client, "redis://one", 0)
    assert got(persistent, 0, NPAGES) == data()


def test_two_clients_come_at_a_time_to_one_server(
    small: _native.Segment, paths: SegmentPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes the one for dead who was not there yet when the other looked who lives."""
    world, url = MemoryWorld(), "redis://server"
    monkeypatch.setattr(tiering, "open_tier", lambda url, who, writer: world.open(who, writer))
    monkeypatch.setattr(tiering, "_ALONE_S", 0.1)

    class Slow:
        late: _native.Client | None = None

        def __getattr__(self, name: str) -> object:
            return getattr(small, name)

        def clients(self) -> list[_native.Client]:
            found = small.clients()
            self.late = small.client("late")
            with contextlib.suppress(TierDownError):
                tiering.assign(paths, small, self.late, url, 0)
            return found

    slow = Slow()
    tiering.assign(paths, cast("_native.Segment", slow), small.client("early"), url, 0)
    assert slow.late is not None
    assert slow.late.tiered == (tiering.of(paths, slow.late) is not None)


@pytest.mark.parametrize("off", [-NPAGES, -1, 1])
def test_withdrawn_while_the_counter_is_off(
    spilled: _native.Pool,
    small: _native.Segment,
    paths: SegmentPaths,
    off: int,
) -> None:
    """Somebody was killed between a swap and its count: what is left the slots say."""

    class Miscounted(Wrapped):
        """The client, whose pages in the tier are counted wrong."""

        def statistics(self) -> dict[str, int]:
            counts = spilled.client.statistics()
            return {**counts, "tier_pages": counts["tier_pages"] + off}

    tiering.withdraw(paths, small, Miscounted(spilled.client).itself)
    assert spilled.statistics()["tier_pages"] == 0
    assert got(spilled, 0, NPAGES) == data()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:relative", "no spill file"),
        ("/no/such/directory/x", "is no directory"),
        ("/tmp/x?colour=red", "no spill file"),
        ("ftp://somewhere", "is no tier"),
    ],
)
def test_what_is_no_tier_is_refused(
    small: _native.Segment, paths: SegmentPaths, client: _native.Client, url: str, words: str
) -> None:
    with pytest.raises(TierError, match=words):
        tiering.assign(paths, small, client, url, 1 << 20)
    assert not client.tiered
    assert not list(tiering.assigned_tiers(paths))
