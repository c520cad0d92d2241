"""Real mounts of one directory, and somebody underneath: random system calls against every content there was.

The model keeps all contents that each file has ever had, and from which of them on each mount may show each
page (docs/mounts.md has the promises): from an open by anybody on the mount, from the end of an own change,
and where changes are reported from the moment that the event loop has read the reports. That moment is made,
not waited for: an own change of an attribute has the loop read all reports before it begins (`settle`). A
read may meet a change (`beside`): then it shows what was before or after it. What the kernel has mapped, or
caches of small files, follows when attributes are asked for again, so the model tells three views apart.
`TMEM_TEST_EXAMPLES` and `TMEM_TEST_STEPS` say how many runs of how many steps there are,
`TMEM_TEST_SEEDS` which: a failure names its own. TMEM_LONG=1 tries all kinds of mounts.
"""

import contextlib
import errno
import itertools
import mmap
import os
import platform
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import wait_until
from tmem.fs.caching import SMALL_BYTES
from tmem.types import PAGE_SIZE

from . import underneath as other
from .conftest import Mounter, Place, in_plenty
from .mounted import (
    ALL_STEPS,
    CACHED,
    MAPPED,
    PAGES,
    READ,
    Beside,
    File,
    Handle,
    Step,
    check,
    chmod,
    cut,
    nothing,
    step,
    touch,
)
from .rings import BY_RINGS

if TYPE_CHECKING:
    from tmem.backends import _native

SIDES = [0, 1]
KEEP_SIZE, PUNCH, ZERO = 1, 3, 16
"""Modes of fallocate(2)."""
EITHER = [False, True]
NAMES = ["a", "b", "c"]
HANDLES = [*range(6)]
PLACES = PAGES
SIZES = [0, 100, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE, SMALL_BYTES, SMALL_BYTES + 2 * PAGE_SIZE]
MOST_HANDLES = 5
YOUNG_SECONDS = 0.1
"""The kernel is told of changes of a file's attributes a moment later if it knows the file no longer than
this (`watch.TAKEN_IN_SECONDS`, with some room)."""
NAMES_ARE_TOLD = tuple(map(int, platform.release().split(".")[:2])) >= (6, 16)


EXAMPLES = int(os.environ.get("TMEM_TEST_EXAMPLES", "4"))
STEPS = int(os.environ.get("TMEM_TEST_STEPS", "120"))
SEEDS = [*map(int, os.environ.get("TMEM_TEST_SEEDS", "").split())]
ONLY_LONG = pytest.mark.skipif(os.environ.get("TMEM_LONG") != "1", reason="TMEM_LONG=1 tries these, too")


class Mounts:
    """The machine; the rest is set by the test."""

    places: list[Place]
    clients: "list[_native.Client]"
    watching: bool
    reported_to_reads: bool
    """Whether each read that comes to the daemon has it look for reports first."""
    allocates: bool
    """Whether fallocate(2) works."""
    folders = itertools.count(1)

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.folder = f"example-{next(self.folders)}"
        self.lower = self.places[0].lower / self.folder
        self.lower.mkdir()
        self.handles: list[Handle] = []
        self.names: dict[str, list[File | None]] = {name: [None] for name in "abc"}
        self.names_since = [dict.fromkeys("abc", 0) for _ in self.places]
        self.sentinels: list[int] = []
        for side, place in enumerate(self.places):
            path = place.lower / f"sentinel-{side}"
            path.write_bytes(b"something")
            self.sentinels.append(os.open(place.point / path.name, os.O_RDONLY))
        self.watchful = False

    def start(self) -> None:
        self.appear("a", self.make(self.lower / "a", 3 * PAGE_SIZE))
        self.appear("b", self.make(self.lower / "b", SMALL_BYTES + 2 * PAGE_SIZE))
        for side in range(len(self.places)):
            for name, file in self.present().items():
                assert self.point(side, name).stat().st_uid == file.owner
                file.known[side] = time.monotonic()

    def can_do(self, step: Step) -> bool:
        return self.watching and (NAMES_ARE_TOLD or step.needs == "reports") if step.needs else True

    def settle_all(self) -> None:
        """Have all mounts show the last of everything."""
        for side in range(len(self.places)):
            self.settle(side)
        self.all_is_right()
        if self.watching:
            for handle in self.handles:
                self.attributes_are_right(handle)
            self.all_is_right()

    def end(self) -> None:
        for handle in self.handles:
            handle.close()
        for sentinel in self.sentinels:
            os.close(sentinel)
        for client in self.clients:
            client.mode = "on"
        shutil.rmtree(self.lower)

    # The model

    def data(self, size: int) -> bytes:
        """Return bytes that nobody has written before."""
        word = f"{next(self.numbers):07d} ".encode()
        return (word * (size // len(word) + 1))[:size]

    def make(self, path: Path, size: int) -> File:
        """Make a file underneath, under a name that no mount is asked for before it is whole."""
        file = File(next(self.numbers), [self.data(size)])
        new = path.with_name(".new")
        new.write_bytes(file.contents[0])
        os.chown(new, file.owner, 0)
        new.rename(path)
        return file

    def appear(self, name: str, file: File | None) -> None:
        self.names[name].append(file)

    def tell_names(self, side: int, *names: str) -> None:
        for name in names or self.names:
            self.names_since[side][name] = len(self.names[name]) - 1

    def point(self, side: int, name: str) -> Path:
        return self.places[side].point / self.folder / name

    def present(self) -> dict[str, File]:
        return {name: files[-1] for name, files in self.names.items() if files[-1] is not None}

    def handle(self, number: int, writes: bool = False) -> Handle | None:
        handles = [handle for handle in self.handles if handle.writes or not writes]
        return handles[number % len(handles)] if handles else None

    def path_below(self, file: File) -> Path | None:
        return next((self.lower / name for name, each in self.present().items() if each is file), None)

    @contextlib.contextmanager
    def changing(
        self, file: File, content: bytes, beside: bool, sly: bool = False, resizes: int | None = None
    ) -> Iterator[None]:
        """Bracket a change of content: both may be shown meanwhile."""
        self.follow(file)
        file.contents.append(content)
        reads = Beside(self.handles if beside else [])
        with reads:
            yield
        file.sly = [sly, sly]
        for side in range(len(self.places)):
            if self.watching and self.reported_to_reads:
                file.promise(side, views=(READ,))
        reads.check(resizes)

    def settle(self, side: int) -> None:
        """Have the mount's event loop read all reports, and the kernel be told."""
        os.setxattr(self.sentinels[side], "user.turn", str(next(self.numbers)).encode())
        if not self.watching:
            return
        if NAMES_ARE_TOLD:
            self.tell_names(side)
        for file in {handle.file for handle in self.handles if handle.side == side}:
            since = file.known[side]
            assert since is not None
            if time.monotonic() - since < YOUNG_SECONDS:
                self.wait_for_attributes(file, side)
            file.settled[side] = len(file.contents) - 1
            file.promise(side, views=(READ,))
            if not file.sly[side]:
                file.promise(side, views=(CACHED,))

    def wait_for_attributes(self, file: File, side: int) -> None:
        """Wait until the kernel has been told that the attributes of a file have changed."""
        handle = next(each for each in self.handles if each.file is file and each.side == side)

        def told() -> bool:
            status = os.fstat(handle.descriptor)
            lower = self.status_below(file, side, status.st_ino)
            return (status.st_size, status.st_mtime_ns) == (lower.st_size, lower.st_mtime_ns)

        wait_until(told, what="attributes follow")

    def status_below(self, file: File, side: int, number: int) -> os.stat_result:
        """Return what the lower file is; one that has lost its name the mount's daemon has open."""
        path = self.path_below(file)
        if path is not None:
            return path.stat()
        device = self.lower.stat().st_dev
        for link in Path(f"/proc/{self.places[side].pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile, or of a mount that has ended
                status = link.stat()
                if (status.st_dev, status.st_ino) == (device, number):
                    return status
        raise AssertionError("the daemon does not have the file open")

    def follow(self, *files: File | None) -> None:
        """Have the kernel drop what it shall, before files change once more and that is reported.

        A report that meets its question for attributes has it ignore the answer, so one read shows what was.
        """
        for handle in self.handles:
            if handle.cached and (not files or handle.file in files):
                os.fstat(handle.descriptor)

    # Through the mounts

    @step(weight=6, side=SIDES, name=NAMES, writes=EITHER, truncates=[False, False, True])
    def open(self, side: int, name: str, writes: bool, truncates: bool) -> None:
        if len(self.handles) >= MOST_HANDLES:
            return
        truncates = truncates and writes
        allowed = self.names[name][self.names_since[side][name] :]
        flags = (os.O_RDWR if writes else os.O_RDONLY) | (os.O_TRUNC if truncates else 0)
        if truncates:
            self.settle(side)
            if len(set(self.names[name][self.names_since[side][name] :])) > 1:
                return  # whose content it is cannot be told
        try:
            descriptor = os.open(self.point(side, name), flags)
        except FileNotFoundError:
            assert None in allowed
            return
        owner = os.fstat(descriptor).st_uid
        file = next((file for file in allowed if file is not None and file.owner == owner), None)
        assert file is not None, f"{name} is another file"
        self.meets(side, file)
        if truncates:
            file.contents.append(b"")
            file.sly[1 - side] = False
        file.promise(side)
        file.sly[side] = False
        self.handles.append(Handle(side, descriptor, file, writes, self.caches(side, file)))

    def meets(self, side: int, file: File) -> None:
        """Note that the kernel looks a file up: a new one, unless it is in use, for it may be forgotten."""
        if not any(handle.file is file and handle.side == side for handle in self.handles):
            file.known[side] = time.monotonic()

    def caches(self, side: int, file: File) -> bool:
        return self.places[side].kernel_caches and 0 < len(file.contents[-1]) <= SMALL_BYTES

    @step(number=HANDLES)
    def close(self, number: int) -> None:
        handle = self.handle(number)
        if handle is not None:
            self.handles.remove(handle)
            handle.close()

    @step(weight=2, number=HANDLES, page=PLACES, start=[0, 100], beside=EITHER)
    def write(self, number: int, page: int, start: int, beside: bool) -> None:
        handle = self.handle(number, writes=True)
        if handle is None:
            return
        data = self.data(PAGE_SIZE - start)
        offset = page * PAGE_SIZE + start
        with self.changing(handle.file, handle.file.written(offset, data), beside):
            assert os.pwrite(handle.descriptor, data, offset) == len(data)
        if not start:
            handle.file.promise(handle.side, page)

    @step(number=HANDLES, size=SIZES, beside=EITHER)
    def truncate(self, number: int, size: int, beside: bool) -> None:
        handle = self.handle(number, writes=True)
        if handle is None:
            return
        content = cut(handle.file.contents[-1], size)
        with self.changing(handle.file, content, beside, resizes=handle.side):
            os.ftruncate(handle.descriptor, size)
        beyond = [page for page in PAGES if page * PAGE_SIZE >= size]
        if beyond:
            handle.file.promise(handle.side, *beyond)

    @step(side=SIDES, name=NAMES, size=[1, 100, PAGE_SIZE], beside=EITHER)
    def append(self, side: int, name: str, size: int, beside: bool) -> None:
        self.settle(side)
        files = set(self.names[name][self.names_since[side][name] :])
        file = files.pop()
        if files or file is None or len(file.contents[-1]) + size > (PAGES[-1] + 1) * PAGE_SIZE:
            return
        data = self.data(size)
        descriptor = os.open(self.point(side, name), os.O_WRONLY | os.O_APPEND)
        self.meets(side, file)
        file.promise(side)
        file.sly[side] = False
        with self.changing(file, file.contents[-1] + data, beside):
            assert os.write(descriptor, data) == size
            os.close(descriptor)

    @step(number=HANDLES, call=[os.fsync, os.fdatasync])
    def sync(self, number: int, call: Callable[[int], None]) -> None:
        handle = self.handle(number)
        if handle is not None:
            call(handle.descriptor)

    @step(number=HANDLES)
    def have_the_kernel_forget(self, number: int) -> None:
        handle = self.handle(number)
        if handle is not None:
            os.posix_fadvise(handle.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    @step(number=HANDLES, mode=[0, KEEP_SIZE, PUNCH, ZERO], page=PLACES, beside=EITHER)
    def fallocate(self, number: int, mode: int, page: int, beside: bool) -> None:
        handle = self.handle(number, writes=True)
        if handle is None:
            return
        start, end = page * PAGE_SIZE, (page + 1) * PAGE_SIZE
        if not self.allocates:
            assert other.fallocate(handle.descriptor, mode, start, PAGE_SIZE) == errno.EOPNOTSUPP
            return
        before = handle.file.contents[-1]
        content = before if mode & KEEP_SIZE else before.ljust(end, b"\0")
        if mode in (PUNCH, ZERO):
            content = content[:start] + bytes(len(content[start:end])) + content[end:]
        resizes = handle.side if len(content) != len(before) else None
        with self.changing(handle.file, content, beside, resizes=resizes):
            assert other.fallocate(handle.descriptor, mode, start, PAGE_SIZE) == 0
        if mode in (PUNCH, ZERO):
            handle.file.promise(handle.side, page)

    @step(number=HANDLES, call=[chmod, touch], beside=EITHER)
    def change_attributes(self, number: int, call: Callable[[int, int], None], beside: bool) -> None:
        handle = self.handle(number)
        if handle is None:
            return
        self.follow(handle.file)
        reads = Beside(self.handles if beside else [])
        with reads:
            call(handle.descriptor, next(self.numbers))
        handle.file.settled[1 - handle.side] = -1
        reads.check()

    @step(number=HANDLES)
    def map(self, number: int) -> None:
        handles = [handle for handle in self.handles if handle.mapped is None]
        if not handles:
            return
        handle = handles[number % len(handles)]
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if handle.writes else 0)
        size = (PAGES[-1] + 1) * PAGE_SIZE
        with contextlib.suppress(ValueError):  # Python maps nothing beyond the end
            handle.mapped = mmap.mmap(handle.descriptor, size, prot=protection)

    @step(number=HANDLES)
    def unmap(self, number: int) -> None:
        handles = [handle for handle in self.handles if handle.mapped is not None]
        if handles:
            handle = handles[number % len(handles)]
            assert handle.mapped is not None
            handle.mapped.close()
            handle.mapped = None

    @step(weight=3, number=HANDLES, page=PLACES, ends=["msync", "fsync", "munmap"], beside=EITHER)
    def store(self, number: int, page: int, ends: str, beside: bool) -> None:
        """Store to mapped memory, and have it written back."""
        handles = [handle for handle in self.handles if handle.mapped is not None and handle.writes]
        if not handles:
            return
        handle = handles[number % len(handles)]
        assert handle.mapped is not None
        self.settle(handle.side)
        size = os.fstat(handle.descriptor).st_size
        if (page + 1) * PAGE_SIZE > min(size, len(handle.file.contents[-1])):
            return
        data = self.data(PAGE_SIZE)
        with self.changing(handle.file, handle.file.written(page * PAGE_SIZE, data), beside):
            assert handle.store(page, data)
            assert handle.peek(page) == data
            if ends == "msync":
                handle.mapped.flush()
            elif ends == "fsync":
                os.fsync(handle.descriptor)
            else:
                handle.mapped.close()
                handle.mapped = None
        handle.file.promise(handle.side, page)

    @step(number=HANDLES)
    def look(self, number: int) -> None:
        """A stat has mapped memory follow."""
        handle = self.handle(number)
        if self.watching and handle is not None:
            told = handle.file.settled[handle.side] == len(handle.file.contents) - 1
            self.attributes_are_right(handle, told)

    def attributes_are_right(self, handle: Handle, settled: bool = True) -> None:
        status = os.fstat(handle.descriptor)
        if settled:
            file = handle.file
            assert status.st_size == len(file.contents[-1])
            path = self.path_below(file)
            if path is not None:
                lower = path.stat()
                # Once it may be another time, which makes the kernel drop pages.
                assert status.st_mtime_ns in (lower.st_mtime_ns, lower.st_mtime_ns ^ 1)
            if not file.sly[handle.side]:
                file.promise(handle.side, views=(MAPPED,))

    @step(needs="names", side=SIDES, old=NAMES, new=NAMES, beside=EITHER)
    def rename(self, side: int, old: str, new: str, beside: bool) -> None:
        self.settle(side)
        self.change_names(lambda name: self.point(side, name), old, new, beside)
        self.tell_names(side, old, new)

    def change_names(self, path: Callable[[str], Path], old: str, new: str, beside: bool) -> None:
        file = self.names[old][-1]
        self.follow(file, self.names[new][-1])
        reads = Beside(self.handles if beside else [])
        with reads:
            if file is None:
                with pytest.raises(FileNotFoundError):
                    path(old).rename(path(new))
                return
            path(old).rename(path(new))
        reads.check()
        if self.names[new][-1] is not file:  # else they are links, and stay
            self.appear(new, file)
            self.appear(old, None)

    @step(needs="names", side=SIDES, old=NAMES, new=NAMES)
    def link(self, side: int, old: str, new: str) -> None:
        self.settle(side)
        file = self.names[old][-1]
        if file is None:
            return
        if self.names[new][-1] is not None:
            with pytest.raises(FileExistsError):
                os.link(self.point(side, old), self.point(side, new))
            return
        self.follow(file)
        os.link(self.point(side, old), self.point(side, new))
        self.appear(new, file)
        self.tell_names(side, new)

    @step(needs="names", side=SIDES, name=NAMES)
    def unlink_or_create(self, side: int, name: str) -> None:
        self.settle(side)
        path = self.point(side, name)
        if self.names[name][-1] is not None:
            self.follow(self.names[name][-1])
            path.unlink()
            self.appear(name, None)
        elif len(self.handles) < MOST_HANDLES:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            file = File(next(self.numbers), [b""])
            os.chown(descriptor, file.owner, 0)
            file.known[side] = time.monotonic()
            self.appear(name, file)
            self.handles.append(Handle(side, descriptor, file, True, False))
        self.tell_names(side, name)

    @step(side=SIDES)
    def pass_the_moment(self, side: int) -> None:
        self.settle(side)

    @step(number=SIDES, mode=["frozen", "off"], seldom=[0, 1, 2, 3])
    def set_mode(self, number: int, mode: str, seldom: int) -> None:
        client = self.clients[number]
        client.mode = mode if client.mode == "on" and not seldom else "on"

    # Underneath

    @step(
        weight=5,
        name=NAMES,
        page=PLACES,
        how=["write", "unnoticed", "punch", "zero", "splice", "store", "truncate", "touch"],
        beside=EITHER,
        size=SIZES,
        then=[(), (nothing,), (chmod,), (touch,)],
    )
    def change_underneath(
        self,
        name: str,
        page: int,
        how: str,
        beside: bool,
        size: int,
        then: tuple[Callable[[int, int], None], ...],
    ) -> None:
        file = self.present().get(name)
        if file is not None:
            self.change_file(file, self.lower / name, page, how, beside, size)
        for change in then:
            for side in range(len(self.places)):
                self.settle(side)
            for handle in self.handles:
                if handle.file is file:
                    self.follow(file)
                    change(handle.descriptor, next(self.numbers))
                    file.settled[1 - handle.side] = -1
            self.all_is_right()

    def change_file(self, file: File, path: Path, page: int, how: str, beside: bool, size: int) -> None:
        before = file.contents[-1]
        data = self.data(PAGE_SIZE)
        offset = page * PAGE_SIZE
        whole = offset + PAGE_SIZE <= len(before)
        if how == "write":
            with self.changing(file, file.written(offset, data), beside):
                other.write(path, offset, data)
        elif how == "truncate":
            with self.changing(file, cut(before, size), beside):
                os.truncate(path, size)
        elif how == "touch":
            self.follow(file)
            os.utime(path, ns=(1, next(self.numbers) * 1000))
            file.settled = [-1, -1]
        elif how == "splice":
            with self.changing(file, file.written(0, data), beside):
                other.splice_in(path, data)
        elif whole and how == "unnoticed":
            with self.changing(file, file.written(0, data), beside, sly=True):
                other.write_unnoticed(path, data)
        elif whole and how == "store":
            with self.changing(file, file.written(0, data), beside):
                other.store(path, data)
        elif whole:
            with self.changing(file, file.written(offset, bytes(PAGE_SIZE)), beside):
                (other.punch if how == "punch" else other.zero)(path, offset, PAGE_SIZE)

    @step(name=NAMES, size=SIZES)
    def replace_underneath(self, name: str, size: int) -> None:
        self.follow(self.names[name][-1])
        self.appear(name, self.make(self.lower / name, size))

    @step(old=NAMES, new=NAMES, beside=EITHER)
    def rename_underneath(self, old: str, new: str, beside: bool) -> None:
        self.change_names(lambda name: self.lower / name, old, new, beside)

    @step(old=NAMES, new=NAMES)
    def link_underneath(self, old: str, new: str) -> None:
        if self.names[old][-1] is not None and self.names[new][-1] is None:
            self.follow(self.names[old][-1])
            os.link(self.lower / old, self.lower / new)
            self.appear(new, self.names[old][-1])

    @step(needs="reports", number=HANDLES, page=PLACES, elsewhere=PLACES)
    def two_writers(self, number: int, page: int, elsewhere: int) -> None:
        """Write through a mount, and to another page underneath at the same time."""
        handle = self.handle(number, writes=True)
        if handle is None or page == elsewhere or (path := self.path_below(handle.file)) is None:
            return
        file = handle.file
        if max(page, elsewhere) * PAGE_SIZE >= len(file.contents[-1]):
            return
        one, two = self.data(PAGE_SIZE), self.data(PAGE_SIZE)
        base = file.contents[-1]
        self.follow(file)
        file.contents.append(file.written(elsewhere * PAGE_SIZE, two))
        alone = base[: page * PAGE_SIZE] + one + base[(page + 1) * PAGE_SIZE :]
        file.contents.append(alone)
        both = alone.ljust(elsewhere * PAGE_SIZE, b"\0")
        both = both[: elsewhere * PAGE_SIZE] + two + both[(elsewhere + 1) * PAGE_SIZE :]
        with self.changing(file, both, beside=True):
            thread = threading.Thread(target=other.write, args=(path, elsewhere * PAGE_SIZE, two))
            thread.start()
            assert os.pwrite(handle.descriptor, one, page * PAGE_SIZE) == PAGE_SIZE
            thread.join()
        file.promise(handle.side, page)

    # What is seen

    @step(weight=6, number=HANDLES, page=PLACES)
    def read(self, number: int, page: int) -> None:
        handle = self.handle(number)
        if handle is not None:
            self.page_is_right(handle, page)

    def page_is_right(self, handle: Handle, page: int) -> None:
        since = handle.file.since[handle.side]
        check(handle, page, since[handle.view][page], handle.read(page), "read")
        if handle.mapped is not None:
            content = handle.peek(page)
            check(handle, page, since[MAPPED][page], content or bytes(PAGE_SIZE), "mapped", whole=True)

    def all_is_right(self) -> None:
        for handle in self.handles:
            for page in PAGES:
                self.page_is_right(handle, page)


def run(seed: int) -> None:
    """Do as many random steps as are wanted; what fails says with which `seed`, and what was done last."""
    choices = random.Random(seed)
    done: list[str] = []
    mounts = Mounts()
    try:
        try:
            mounts.start()
            mounts.watchful = not choices.randrange(4)
            for _ in range(STEPS):
                one = choices.choices(ALL_STEPS, [each.weight for each in ALL_STEPS])[0]
                arguments = {name: choices.choice(options) for name, options in one.choices.items()}
                if mounts.can_do(one):
                    done.append(f"{one.name}({arguments})")
                    getattr(mounts, one.name)(**arguments)
                    if mounts.watchful:
                        mounts.all_is_right()
            mounts.settle_all()
        finally:
            mounts.end()
    except BaseException as error:
        error.add_note("\n".join([f"TMEM_TEST_SEEDS={seed}", *done[-40:]]))
        raise


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("options", "pools"),
    [
        ("loop=native", "own"),
        ("loop=native", "shared"),
        ("loop=native,watch=off", "own"),
        (BY_RINGS, "own"),
        ("loop=plain", "own"),
        *(
            pytest.param(options, "shared", marks=ONLY_LONG)
            for options in ("loop=native,watch=off", BY_RINGS, "loop=plain")
        ),
    ],
)
def test_what_is_promised_in_any_order(
    segment: "_native.Segment",
    mounter: Mounter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: str,
    pools: str,
) -> None:
    in_plenty(monkeypatch)
    shared = uuid.uuid4()
    Mounts.places = []
    for name, cache in (("web0", "auto"), ("web1", "direct")):
        together = ""
        if pools == "shared":
            segment.client(name).authorise(shared.bytes)
            together = f",shared={shared}"
        place = mounter(f"client={name},cache={cache},{options}{together}", point=tmp_path / name)
        place.kernel_caches = cache == "auto"
        Mounts.places.append(place)
    Mounts.watching = Mounts.places[0].statistics().watching
    if not Mounts.watching and "watch=off" not in options:
        pytest.skip("the kernel reports no changes of this file system")
    Mounts.reported_to_reads = "loop=plain" in options
    Mounts.allocates = "loop=native" in options
    Mounts.clients = [segment.client(name, create=False) for name in ("web0", "web1")]
    seeds = SEEDS or [random.randrange(1 << 32) for _ in range(EXAMPLES)]
    for seed in seeds:
        run(seed)
    for place in Mounts.places:
        statistics = place.statistics()
        assert statistics.noticed_changes or not Mounts.watching
        assert statistics.put_pages
    assert segment.check() == []
