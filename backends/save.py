"""Save files: clients out of a segment that goes on working, and back into one.

    save    header, then for each client: rounds to the file, the last ones into memory, thaw, those to the
            file; then the end
    restore everything into clients that nobody sees, one commit at the end

Not for the format (`savefile`), copying (`copying`) or filling (`restoring`). Threading: one thread calls;
streams have threads of their own.
"""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tmem.backends import interrupts
from tmem.backends.clients import clients_by_name
from tmem.backends.copying import ClientCopy, PoolsChangedError, Spool
from tmem.backends.restoring import Restorer
from tmem.backends.savefile import Kind
from tmem.backends.saverecords import Header, Summary, Totals, summaries
from tmem.backends.streams import FrameInput, FrameOutput
from tmem.errors import CorruptPageError, PoolError, SaveFileError

if TYPE_CHECKING:
    from tmem.backends import _native

SPOOL_BYTES = (16 << 20, 128 << 20)
"""The least and the most memory for what changes while a round is written."""
FREEZE_LIMIT_S = 10.0
"""How long a client that has changed more than that may stay frozen for it to be written."""
_SHRINKING = 0.5  # else the file gets several times as long as it has to be
_SPOOL_ROUNDS = 6
_SPOOL_SHORT_BYTES = 256 << 10
_ATTEMPTS = 3

Watch = Callable[[int, int], None]
"""Gets the bytes that are done, and about how many there are."""


@dataclass(frozen=True)
class Saved:
    """How one client was saved or handed over."""

    name: str
    pages: int
    """In its persistent pools when it was frozen."""
    rounds: int
    frozen_s: float
    """How long its puts were refused, and its devices waited with writes."""


@dataclass(frozen=True)
class Restored:
    """What a save file gave."""

    clients: tuple[str, ...]
    records: int
    """Pages that were put and flushed; a page that changed while it was saved counts more than once."""
    data_bytes: int
    """Bytes of records in the file."""


def _ignore(done_bytes: int, all_bytes: int) -> None:
    pass


def choose(store: "_native.Segment", segment: str, names: Iterable[str]) -> "dict[str, _native.Client]":
    """Return the clients called `names`, all if there are none, in order. `PoolError` if one is missing."""
    clients = clients_by_name(store)
    wanted = sorted(set(names))
    if missing := [name for name in wanted if name not in clients]:
        raise PoolError(f"segment {segment!r} has no client {missing[0]!r}: see 'tmem --name {segment} list'")
    return {name: clients[name] for name in wanted or sorted(clients)}


def save(
    store: "_native.Segment",
    segment: str,
    descriptor: int,
    names: Sequence[str] = (),
    watch: Watch = _ignore,
) -> list[Saved]:
    """Write the clients called `names` (none: all) to `descriptor`; how it went, one by one.

    A client that ends meanwhile is left out, unless it was asked for. Raises `TmemError` and OSError;
    whatever happens, no client stays frozen.
    """
    chosen = choose(store, segment, names)
    header = Header.here("save", segment, summaries(chosen.values()), secrets.token_hex(16))
    out = FrameOutput(descriptor)
    done = []
    try:
        out.document(Kind.HEADER, 0, header.document())
        number = 0
        for name, client in chosen.items():
            for attempt in range(_ATTEMPTS):
                number += 1
                try:
                    done.append(_save_client(client, name, number, out, header.clients, watch))
                    break
                except PoolsChangedError:
                    if attempt + 1 == _ATTEMPTS:
                        raise SaveFileError(
                            f"client {name!r} changes its pools all the time: try again later"
                        ) from None
                except PoolError as error:
                    if names or client in store.clients():
                        raise SaveFileError(f"client {name!r} cannot be saved: {error}") from None
                    break
                except CorruptPageError as error:
                    raise CorruptPageError(
                        f"client {name!r} cannot be saved: {error}; --client names the others"
                    ) from None
                except TimeoutError as error:
                    raise SaveFileError(
                        f"client {name!r} changes faster than it can be written ({error}): freeze it "
                        "meanwhile, or save to a faster place"
                    ) from None
        out.drain()
        out.document(Kind.END, 0, Totals(len(done), out.frames, out.data_bytes).document())
        out.close()
    except BaseException:
        out.abandon()
        raise
    return done


def _save_client(
    client: "_native.Client",
    name: str,
    number: int,
    out: FrameOutput,
    all_: Sequence[Summary],
    watch: Watch,
) -> Saved:
    expected = sum(summary.data_bytes for summary in all_)

    copy = ClientCopy(client, number, out, lambda: watch(out.data_bytes, expected))
    try:
        with copy:
            size = copy.copy(out.drain, _SHRINKING)
            # What changed while the disk had the last round goes into memory, which is faster than the
            # client.
            spool = Spool(out, min(max(2 * size, SPOOL_BYTES[0]), SPOOL_BYTES[1]))
            for _ in range(_SPOOL_ROUNDS):
                if copy.round(spool) <= _SPOOL_SHORT_BYTES:
                    break
                if spool.overflowed:
                    spool.empty()
            out.timeout_s = FREEZE_LIMIT_S
            copy.freeze(spool)
    except (PoolError, PoolsChangedError):
        if copy.begun:  # else the file says nothing of it yet
            out.document(Kind.CLIENT_DROPPED, number, {})
        raise
    finally:
        out.timeout_s = None
    spool.empty()
    copy.end()
    return Saved(name, copy.pages, copy.rounds, copy.frozen_s)


@contextmanager
def target(path: Path, force: bool = False) -> Iterator[int]:
    """Yield a descriptor whose content becomes the file `path`, on disk, if the block ends well.

    Until then it is ``path.partial``, which goes when the block fails; one that a killed save has left is
    overwritten. Raises `SaveFileError` if `path` is there and not to be replaced (`force`), or cannot be
    written.
    """
    _check_target(path, force)
    partial = path.with_name(f"{path.name}.partial")
    descriptor = -1
    try:
        with interrupts.deferred():
            descriptor = _open_partial(partial)
        yield descriptor
        os.fsync(descriptor)
        _check_target(path, force)
        partial.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        if descriptor >= 0:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SaveFileError(
                f"{path} cannot be written: {error.strerror or error}; make room there, or give another place"
            ) from error
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _check_target(path: Path, force: bool) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise SaveFileError(f"{path} cannot be written ({error.strerror}): give another name") from error
    if not stat.S_ISREG(status.st_mode):
        raise SaveFileError(f"{path} is no ordinary file: give another name, or - for standard output")
    if not force:
        raise SaveFileError(f"{path} exists already: give another name, or --force to replace it")


def _open_partial(partial: Path) -> int:
    """Open the file for us alone, empty; one that somebody else is writing is refused."""
    while True:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(partial, flags, 0o600)
        except FileNotFoundError:
            raise SaveFileError(
                f"there is no directory {partial.parent}: make it, or give another name"
            ) from None
        except OSError as error:
            raise SaveFileError(
                f"{partial} cannot be written ({error.strerror}): give another name"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(descriptor)
            if partial.exists() and os.path.samestat(ours, partial.stat()):
                os.ftruncate(descriptor, 0)
                os.fchmod(descriptor, 0o600)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise SaveFileError(
                f"{partial} is being written by another save: wait until it has ended"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the other save has just ended and taken the name away


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync directories
            raise
    finally:
        os.close(descriptor)


def restore(
    store: "_native.Segment",
    segment: str,
    descriptor: int,
    name: str,
    names: Sequence[str] = (),
    called: str | None = None,
    watch: Watch = _ignore,
) -> Restored:
    """Make the clients called `names` (none: all) of the save file at `descriptor`.

    `name` is what messages call the file, `called` another name for the one client. All clients appear in the
    end, or none: raises `SaveFileError` for a file that is not sound or does not fit.
    """
    chosen = frozenset(names) or None
    with (
        closing(FrameInput(descriptor, name, Kind.END, whole=True)) as frames,
        Restorer(store, segment, name, chosen, called) as restorer,
    ):
        header = restorer.begin(frames, "save")
        expected = sum(summary.data_bytes for summary in header.clients)
        for frame in frames:
            if frame.kind is Kind.END:
                restorer.check_totals(frame, frames)
            else:
                restorer.apply(frame)
            watch(frames.data_bytes, expected)
        restorer.commit()
        return Restored(tuple(restorer.committed), restorer.records, frames.data_bytes)
