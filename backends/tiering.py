"""Which client has which tier, so that every process that serves its pages finds it.

A client's tier is a symbolic link in the segment's state directory, ``tier-ID-SERIAL``, whose target is the
tier's URL: it takes no room on a full tmpfs, appears whole or not at all, and goes with the reboot that ends
the segment. ``file:/PATH`` is a spill file, ``redis://`` and its kin are Valkey or Redis. The native core
asks `source` when it meets the first page in the tier of a client for which nothing was attached yet.

Who gives a client a tier, takes the link of one away, or removes what a tier holds has the lock of the state
directory meanwhile, for a process that is slow may otherwise find another's tier where it expects its own.

Not for demotion (`demotion`), nor for what a tier is (`tiers.contract`). A kind of tier is imported by who
has one: every command imports this. Threading: any thread.
"""

import contextlib
import fcntl
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends.paths import SegmentPaths
from tmem.backends.tiers.contract import MAX_BEGUN, Tier, TierIdentity
from tmem.errors import TierCorruptError, TierDownError, TierError, TmemError
from tmem.types import parse_size

if TYPE_CHECKING:
    from tmem.backends import _native

_READERS_S = 60.0
"""How long a withdrawal waits for who reads from the tier: longer than a read that fails lasts."""
_ENDING_S = 3.0
"""How long to wait for the manager to let go of a tier whose client is no more."""
_ALONE_S = 60.0
"""How long to wait for a command that has the lock."""
_REDIS = ("redis", "rediss", "redis+cluster", "rediss+cluster")

Source = str | Callable[[list[int]], list[bytes | None]]


@dataclass(frozen=True)
class Assigned:
    """One link: whose it is, and the tier's URL."""

    link: Path
    client: int
    serial: int
    url: str


def source(path: str, nonce: int, client: int, serial: int) -> Source:
    """Return how to read the records of a client of the segment at `path`: the path of a spill file, or a
    function. For the native core. Raises `TierError`."""
    url = _url(_state(Path(path)) / f"tier-{client}-{serial}")
    file = spill_path(url)
    if file is not None:
        return str(file)
    return open_tier(url, TierIdentity(nonce, client, serial), writer=False).read


def open_tier(url: str, identity: TierIdentity, writer: bool) -> Tier:
    """Open the tier at `url`, which exists; `TierError` if that fails."""
    file = spill_path(url)
    if file is not None:
        from tmem.backends.tiers import spill

        return spill.SpillFile(file, identity, writer)
    if url.partition("://")[0] in _REDIS:
        from tmem.backends.tiers.redis_tier import RedisTier
        from tmem.backends.tiers.redis_url import RedisAddress

        return RedisTier(RedisAddress.parse(url), identity, writer)
    raise TierError(
        f"{shown(url)!r} is no tier: give the path of a file, as /var/lib/tmem/swap.spill, or a redis:// URL"
    )


def batch_bytes(url: str) -> int:
    """Return how much to write to the tier at `url` at a time: servers make every batch wait for replicas."""
    return 1 << 20 if spill_path(url) is not None else 4 << 20


def batches_at_once(url: str) -> int:
    """Return how many batches are on their way there at a time: servers work on one while the next is
    collected, a disk is written by who asks."""
    return 1 if spill_path(url) is not None else MAX_BEGUN


def identity(segment: "_native.Segment", client: "_native.Client") -> TierIdentity:
    """Return whose pages the client's tier holds."""
    return TierIdentity(segment.nonce, client.id, client.serial)


def assign(
    paths: SegmentPaths, segment: "_native.Segment", client: "_native.Client", url: str, size_bytes: int
) -> str:
    """Give the client the tier at `url`; return the URL in full.

    A spill file is made, of `size_bytes` unless the URL has ``?size=``.

    The same tier again changes nothing. Raises `TierError`: also if the client has another tier.
    """
    url, size_bytes = _full(paths, client, url, size_bytes)
    with _alone(paths.state):
        return _assign(paths, segment, client, url, size_bytes)


def _assign(
    paths: SegmentPaths, segment: "_native.Segment", client: "_native.Client", url: str, size_bytes: int
) -> str:
    link = _link(paths, client)
    if (found := of(paths, client)) is not None:
        if found == url:
            client.tiered = True
            return url
        raise TierError(
            f"{client.name} has the tier {shown(found)} already: take that away first, with --tier none"
        )
    _await_end(paths, segment, url)
    # Mostly nothing: but the link may have gone with the state directory, and the pages wait for it.
    there = memoryview(_locations(client)).cast("Q")
    file, who = spill_path(url), identity(segment, client)
    if file is not None:
        from tmem.backends.tiers import orphans, spill

        if not there:
            _refuse_if_used(file, segment)
            orphans.remove(file.parent, _living(segment), orphans.started_s())
            spill.create(file, who, size_bytes)
        elif not file.exists() or spill.identity_of(file) != who:
            raise _elsewhere(client)
    else:
        tier = open_tier(url, who, writer=True)
        try:
            if there and tier.read(there[:1].tolist()) == [None]:
                raise _elsewhere(client)
            tier.retain(there)  # it must answer now
        finally:
            tier.close()
    link.symlink_to(url)
    client.tiered = True
    return url


def _elsewhere(client: "_native.Client") -> TierError:
    return TierError(
        f"{client.name} has pages in another tier, which this segment knows of no more: give that one"
    )


def attach(segment: "_native.Segment", client: "_native.Client") -> bool:
    """Have this process read the client's tier from now on, if it has one; `TierError` if that fails.

    Without it the first page in the tier brings it about: inside somebody's request.
    """
    epoch = client.tier_epoch  # first: the link may be another tier's as soon as it is read
    if not client.tiered:
        return False
    client.attach_tier(source(segment.path, segment.nonce, client.id, client.serial), epoch)
    return True


def of(paths: SegmentPaths, client: "_native.Client") -> str | None:
    """Return the URL of the client's tier, None if it has none."""
    try:
        return _target(_link(paths, client))
    except OSError:
        return None


def shown(url: str) -> str:
    """Return the URL without a password."""
    from tmem.backends.tiers.redis_url import RedisAddress

    return RedisAddress.shown(url)


def withdraw(
    paths: SegmentPaths,
    segment: "_native.Segment",
    client: "_native.Client",
    progress: Callable[[int], None] = lambda left_pages: None,
) -> None:
    """Bring the client's pages back into memory, and take its tier away; nothing if it has none.

    `progress` gets the pages that are still to come back. Raises `TmemError` if there is no memory for them,
    or the tier does not answer; then what came back is back, and the rest stays where it is.
    """
    if of(paths, client) is None:
        return
    try:
        client.tiered = False  # from here on nothing is demoted
        while True:
            # What is left the slots say: the counters may be off for a while after a death.
            while left := len(_locations(client)) // 8:
                _lap(client, left, progress)
            if _take_away(paths, segment, client):
                return
    except BaseException:
        with contextlib.suppress(TmemError, OSError), _alone(paths.state):
            if of(paths, client) is not None:
                client.tiered = True
        raise


def _take_away(paths: SegmentPaths, segment: "_native.Segment", client: "_native.Client") -> bool:
    """Take the client's tier away if nothing is there; False if something is."""
    with _alone(paths.state):
        if of(paths, client) is None:
            return True  # another command was quicker
        client.tiered = False  # or one that has failed has given it back meanwhile
        if _locations(client):
            return False
        link = _link(paths, client)
        # The epoch: another tier of this client may have ended just before, and still be there.
        ended = link.with_name(f"{link.name.replace('tier-', 'ended-', 1)}-{client.tier_epoch}")
        link.rename(ended)
        with contextlib.suppress(TierDownError):  # the manager writes to it: then that removes it
            _end(segment.nonce, Assigned(ended, client.id, client.serial, _target(ended)))
        return True


def _locations(client: "_native.Client") -> bytes:
    """Return what slots name in the tier, 8 bytes each, once nobody reads anything else any more."""
    until = time.monotonic() + _READERS_S
    while (live := client.live(200)) is None:
        if time.monotonic() > until:
            raise TierError(f"somebody still reads from the tier of {client.name}: try again")
    return live


def _lap(client: "_native.Client", left_pages: int, progress: Callable[[int], None]) -> None:
    """Bring everything back once around."""
    hand = 0
    while True:
        progress(left_pages)
        hand, came = client.promote(hand, 512)
        if not hand:
            return
        left_pages = max(left_pages - came, 0)


def ended_tiers(paths: SegmentPaths) -> Iterator[Assigned]:
    """Yield the tiers that were taken away and may still have to be removed."""
    return _links(paths, "ended")


def assigned_tiers(paths: SegmentPaths) -> Iterator[Assigned]:
    """Yield the tiers of all clients, also of such as are no more."""
    return _links(paths, "tier")


def _links(paths: SegmentPaths, kind: str) -> Iterator[Assigned]:
    for link in sorted(paths.state.glob(f"{kind}-*-*")):
        number, serial = link.name.removeprefix(f"{kind}-").split("-")[:2]
        with contextlib.suppress(OSError):  # gone this moment
            if number.isdigit() and serial.isdigit() and link.is_symlink():
                yield Assigned(link, int(number), int(serial), _target(link))


def end(segment: "_native.Segment", assigned: Assigned) -> None:
    """Remove what a client stored in its tier, for it is no more or has nothing there; then the link. Nothing
    if somebody else has done so: what is there by now may be what the client has been given since.

    Raises `TierDownError` if the tier does not answer, or its writer has not let go of it: try again.
    """
    with _alone(assigned.link.parent, _ENDING_S):
        if assigned.link.is_symlink():
            _end(segment.nonce, assigned)


def end_all(paths: SegmentPaths, nonce: int) -> None:
    """Remove what all clients of a segment that is no more stored in tiers; what stays is told."""
    for assigned in [*assigned_tiers(paths), *ended_tiers(paths)]:
        try:
            _end(nonce, assigned)
        except TierError as error:
            import logging  # a command that lists clients need not load it

            logging.getLogger(__name__).warning(
                "%s: what was stored in %s stays there, and nobody needs it: remove it by hand",
                error,
                shown(assigned.url),
            )


def _end(nonce: int, assigned: Assigned) -> None:
    who = TierIdentity(nonce, assigned.client, assigned.serial)
    try:
        open_tier(assigned.url, who, writer=True).destroy()
    except TierCorruptError:
        pass  # somebody else's by now
    except TierDownError:
        file = spill_path(assigned.url)
        if file is None or file.exists():
            raise
    assigned.link.unlink(missing_ok=True)


def _await_end(paths: SegmentPaths, segment: "_native.Segment", url: str) -> None:
    """Remove what was there before, once the manager has let go of it; that looks often."""
    links = [
        *ended_tiers(paths),
        *assigned_tiers(paths),
    ]  # first: who is none of the living after that is dead
    lives = {(client.id, client.serial) for client in segment.clients()}
    until = time.monotonic() + _ENDING_S
    for old in links:
        if old.url != url or (old.link.name.startswith("tier-") and (old.client, old.serial) in lives):
            continue
        while old.link.is_symlink():
            try:
                _end(segment.nonce, old)
            except TierDownError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)


@contextlib.contextmanager
def _alone(state: Path, patience_s: float | None = None) -> Iterator[None]:
    """Hold the lock under which tiers come and go; `TierDownError` if others have it for long."""
    until = time.monotonic() + (_ALONE_S if patience_s is None else patience_s)
    try:
        descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TierDownError(
            f"{state} cannot be opened ({error.strerror}): 'tmem --name {state.stem} start -d' makes it "
            "if it is gone; if it is another user's, run this as that user or as root"
        ) from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TierDownError(
                        "another command gives or takes away a tier: try again once it has ended"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _state(segment: Path) -> Path:
    return segment.with_name(f"{segment.name}.d")


def _link(paths: SegmentPaths, client: "_native.Client") -> Path:
    return paths.state / f"tier-{client.id}-{client.serial}"


def _url(link: Path) -> str:
    try:
        return _target(link)
    except OSError:
        raise TierDownError(
            f"the link {link}, which names the tier with the client's pages, is gone: make it again, with "
            "the tier's URL as its target"
        ) from None


def spill_path(url: str) -> Path | None:
    """Return the path of a spill file, None for another kind of tier."""
    return Path(urllib.parse.unquote(url.removeprefix("file:"))) if url.startswith("file:/") else None


def _full(paths: SegmentPaths, client: "_native.Client", url: str, size_bytes: int) -> tuple[str, int]:
    """Return the URL as it is kept, and the size of the tier; a plain path is that of a spill file."""
    if url.startswith("/"):
        url = f"file:{url}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "file":
        return url, size_bytes
    options = urllib.parse.parse_qs(parts.query, keep_blank_values=True)
    if parts.netloc or not parts.path.startswith("/") or options.keys() - {"size"}:
        raise TierError(f"{url!r} is no spill file: give a path from / on, such as file:/var/lib/x?size=4G")
    if "size" in options:
        size_bytes = parse_size(options["size"][-1])
    path = Path(urllib.parse.unquote(parts.path))
    if path.is_dir() or parts.path.endswith("/"):
        path = path / f"tmem-{paths.name}-{client.name}.spill"
    if not path.parent.is_dir():
        raise TierError(
            f"{path.parent} is no directory: make it first, on the disk that is to hold the pages"
        )
    return f"file:{urllib.parse.quote(str(path))}", size_bytes


def _target(link: Path) -> str:
    """Return the URL that a link holds, as it was written: a `Path` would make one slash of two."""
    return os.readlink(link)  # noqa: PTH115


def _refuse_if_used(file: Path, segment: "_native.Segment") -> None:
    """Raise if the spill file at the path is that of a client that lives, here or in another segment."""
    from tmem.backends.tiers import spill

    if not file.exists() or not file.stat().st_size:
        return
    who = spill.identity_of(file)
    if who.nonce in _living(segment):
        raise TierError(f"{file} holds pages of another client: give another path")


def _living(segment: "_native.Segment") -> set[int]:
    """Return the nonces of the segments beside this one, and its own."""
    from tmem.backends import _native

    found = {segment.nonce}
    for path in Path(segment.path).parent.iterdir():
        if not path.is_file() or path.is_symlink():
            continue
        try:
            other = _native.attach(str(path))
        except (TmemError, OSError):
            continue
        found.add(other.nonce)
        other.close()
    return found
