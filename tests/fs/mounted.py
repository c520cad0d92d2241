"""What may be shown of files by mounts of one directory, and who looks: see `test_mounted_model`."""

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tmem.fs.caching import SMALL_BYTES
from tmem.types import PAGE_SIZE

T = TypeVar("T", bound=Callable[..., None])
PAGES = [0, 1, 2, 3, SMALL_BYTES // PAGE_SIZE, SMALL_BYTES // PAGE_SIZE + 1]
"""Pages that are looked at: small files have the first ones only, and the last ones make a file large."""
VIEWS = READ, CACHED, MAPPED = (0, 1, 2)
"""What read(2) shows of a file with direct_io, and without, and what its mapped memory does."""


@dataclass(frozen=True)
class Step:
    """One thing that can be done: a method, and what its arguments are chosen from."""

    name: str
    weight: int
    needs: str
    """What the mount must be told of: ``reports`` of changes, or ``names`` as well; empty: nothing."""
    choices: dict[str, Sequence[object]]


ALL_STEPS: list[Step] = []


def step(*, weight: int = 1, needs: str = "", **choices: Sequence[object]) -> Callable[[T], T]:
    """Have a method be a step."""

    def keep(method: T) -> T:
        ALL_STEPS.append(Step(method.__name__, weight, needs, choices))
        return method

    return keep


def cut(content: bytes, size: int) -> bytes:
    return content[:size].ljust(size, b"\0")


def page_of(content: bytes, page: int) -> bytes:
    return content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


def nothing(descriptor: int, number: int) -> None:
    pass


def chmod(descriptor: int, number: int) -> None:
    os.fchmod(descriptor, 0o600 + number % 8)


def touch(descriptor: int, number: int) -> None:
    os.utime(descriptor, ns=(1, number * 1000))  # not next to each other: see `Nodes.has_old`


@dataclass(eq=False)
class File:
    """One file, whatever its names are: its contents, the last one last."""

    owner: int
    """What tells it apart, through a mount as well."""
    contents: list[bytes] = field(repr=False)
    since: list[list[dict[int, int]]] = field(
        default_factory=lambda: [[dict.fromkeys(PAGES, 0) for _ in VIEWS] for _ in range(2)]
    )
    """For each mount, view and page the first content that it may show."""
    sly: list[bool] = field(default_factory=lambda: [False, False])
    """Whether its last change left size and time of modification as they were, and no open has told since."""
    known: list[float | None] = field(default_factory=lambda: [None, None])
    """Since when each mount's kernel has known it."""
    settled: list[int] = field(default_factory=lambda: [0, 0])
    """The last content whose attributes are asked for anew by each mount's kernel."""

    def written(self, offset: int, data: bytes) -> bytes:
        content = self.contents[-1].ljust(offset, b"\0")
        return content[:offset] + data + content[offset + len(data) :]

    def promise(self, side: int, *pages: int, views: tuple[int, ...] = VIEWS, at: int | None = None) -> None:
        last = len(self.contents) - 1 if at is None else at
        for view in views:
            since = self.since[side][view]
            for page in pages or PAGES:
                since[page] = max(since[page], last)

    def shown_since(self, page: int, first: int, whole: bool, resized: bool = False) -> set[bytes]:
        """Return what may be shown of a page from a content on: its size may be of another one.

        Of any if it is being `resized`, when the kernel learns of no size.
        """
        pages = [page_of(content, page) for content in self.contents[first:]]
        sizes = {len(page_of(content, page)) for content in self.contents[0 if resized else first :]}
        shown = {cut(content, size) for content in pages for size in sizes}
        return {content.ljust(PAGE_SIZE, b"\0") for content in shown} if whole else shown


@dataclass(eq=False)
class Handle:
    side: int
    descriptor: int
    file: File
    writes: bool
    cached: bool
    mapped: mmap.mmap | None = None

    @property
    def view(self) -> int:
        return CACHED if self.cached else READ

    def read(self, page: int) -> bytes:
        return os.pread(self.descriptor, PAGE_SIZE, page * PAGE_SIZE)

    def peek(self, page: int) -> bytes | None:
        """Return a page of mapped memory; None if it has none there, which would be SIGBUS."""
        assert self.mapped is not None
        copy = os.memfd_create("copy")
        try:
            with memoryview(self.mapped) as view:
                os.pwrite(copy, view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE], 0)
            return os.pread(copy, PAGE_SIZE, 0)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return None
        finally:
            os.close(copy)

    def store(self, page: int, data: bytes) -> bool:
        """Store to mapped memory; False if it has none there."""
        assert self.mapped is not None
        source = os.memfd_create("source")
        try:
            os.pwrite(source, data, 0)
            with memoryview(self.mapped) as view:
                return os.preadv(source, [view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]], 0) == len(data)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return False
        finally:
            os.close(source)

    def close(self) -> None:
        if self.mapped is not None:
            self.mapped.close()
        os.close(self.descriptor)


class Beside:
    """Reads of all handles' pages by another thread while something is done, checked at the end."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles
        self._seen: list[tuple[Handle, int, int, bytes]] = []
        self._over = threading.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for handle, page in itertools.cycle(itertools.product(self._handles, PAGES)):
            first = handle.file.since[handle.side][handle.view][page]
            self._seen.append((handle, page, first, handle.read(page)))
            self._begun.set()
            if self._over.is_set():
                return

    def __enter__(self) -> None:
        if self._handles:
            self._thread.start()
            assert self._begun.wait(60)

    def __exit__(self, *_: object) -> None:
        if self._handles:
            self._over.set()
            self._thread.join()

    def check(self, resizes: int | None = None) -> None:
        """Check all of it; `resizes` is the mount through which a file is given another size."""
        for handle, page, first, content in self._seen:
            resized = handle.cached and handle.side == resizes
            check(handle, page, first, content, "beside a change", resized=resized)


def check(
    handle: Handle,
    page: int,
    first: int,
    content: bytes,
    what: str,
    whole: bool = False,
    resized: bool = False,
) -> None:
    allowed = handle.file.shown_since(page, first, whole, resized)
    if content not in allowed:
        every = handle.file.shown_since(page, 0, whole)
        raise AssertionError(
            f"{what}, mount {handle.side} shows page {page} of {handle.file.owner} as {brief(content)}, "
            f"{'cached' if handle.cached else 'direct'}, "
            f"of {'an older' if content in every else 'no'} content, instead of {[*map(brief, allowed)]}"
        )


def brief(content: bytes) -> str:
    return f"{content[:12]!r}... ({len(content)})"
