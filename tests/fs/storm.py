"""A program that works on a directory from several threads, verifies all it reads, and says what it has done.

``python storm.py DIRECTORY`` runs until its standard input ends, then prints one JSON object: operations of
each kind, and the longest time of a 4 KiB read in seconds. The first thing that is wrong ends it with a
traceback.
"""

import contextlib
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PAGE = 4096
PAGES = 512


def page(name: int, index: int, version: int) -> bytes:
    """Return what page `index` of file `name` holds after its write number `version`."""
    return b"%08d%08d%08d" % (name, index, version) * (PAGE // 24) + b"." * (PAGE % 24)


class Storm:
    """The work; each method named `do_...` is one turn of one thread, which has random numbers of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.over = threading.Event()
        self.failures: list[BaseException] = []
        self.counts: dict[str, int] = {}
        self.slowest_seconds = 0.0
        with (directory / "steady").open("wb") as file:
            file.writelines(page(0, index, 0) for index in range(PAGES))
        (directory / "many").mkdir()
        for number in range(300):
            (directory / "many" / f"{number:03d}{'x' * 200}").touch()
        self.steady = os.open(directory / "steady", os.O_RDONLY)
        self.written = os.open(directory / "written", os.O_RDWR | os.O_CREAT)
        self.versions = [0] * PAGES
        os.pwrite(self.written, b"".join(page(1, index, 0) for index in range(PAGES)), 0)
        self.gone = os.open(directory / "gone", os.O_RDWR | os.O_CREAT)
        os.pwrite(self.gone, b"".join(page(2, index, 0) for index in range(PAGES)), 0)
        (directory / "gone").unlink()
        with (directory / "mapped").open("wb+") as file:
            file.truncate(16 * PAGE)
            self.mapping = None
            with contextlib.suppress(OSError):  # ENODEV before Linux 6.6
                self.mapping = mmap.mmap(file.fileno(), 16 * PAGE)

    def do_read(self, random_: random.Random) -> None:
        index = random_.randrange(PAGES)
        start = time.perf_counter()
        data = os.pread(self.steady, PAGE, index * PAGE)
        self.slowest_seconds = max(self.slowest_seconds, time.perf_counter() - start)
        assert data == page(0, index, 0), f"steady page {index}: {data[:24]!r}"

    def do_write(self, random_: random.Random) -> None:
        index = random_.randrange(PAGES)
        assert os.pread(self.written, PAGE, index * PAGE) == page(1, index, self.versions[index])
        self.versions[index] += 1
        assert os.pwrite(self.written, page(1, index, self.versions[index]), index * PAGE) == PAGE
        if not random_.randrange(50):
            os.fsync(self.written)

    def do_unlinked(self, random_: random.Random) -> None:
        index = random_.randrange(PAGES)
        assert os.pread(self.gone, PAGE, index * PAGE) == page(2, index, 0)

    def do_mapped(self, random_: random.Random) -> None:
        if self.mapping is not None:
            at = random_.randrange(16) * PAGE
            value = random_.randbytes(8)
            self.mapping[at : at + 8] = value
            if not random_.randrange(20):
                self.mapping.flush()
            assert self.mapping[at : at + 8] == value

    def do_list(self, random_: random.Random) -> None:
        names = [entry.name for entry in os.scandir(self.directory / "many")]
        assert len(names) == len(set(names)) == 300

    def do_names(self, random_: random.Random) -> None:
        path, other = self.directory / "name", self.directory / "other"
        data = random_.randbytes(random_.randrange(3 * PAGE))
        path.write_bytes(data)
        path.rename(other)
        assert not path.exists()
        with other.open("rb") as file:
            other.unlink()
            assert file.read() == data
        with contextlib.ExitStack() as stack:
            stack.callback((self.directory / "tree").rmdir)
            (self.directory / "tree").mkdir()
            (self.directory / "tree" / "a").symlink_to("b")
            assert (self.directory / "tree" / "a").readlink() == Path("b")
            (self.directory / "tree" / "a").unlink()

    def repeat(self, turn: Callable[[random.Random], None], seed: int) -> None:
        random_ = random.Random(seed)
        name = f"{turn.__name__.removeprefix('do_')} {seed}"
        self.counts[name] = 0
        try:
            while not self.over.is_set():
                turn(random_)
                self.counts[name] += 1
        except BaseException as error:
            self.failures.append(error)
            self.over.set()

    def run(self) -> None:
        turns = [self.do_read, self.do_read, self.do_write, self.do_unlinked]
        turns += [self.do_mapped, self.do_list, self.do_names]
        threads = [threading.Thread(target=self.repeat, args=(turn, seed)) for seed, turn in enumerate(turns)]
        for thread in threads:
            thread.start()
        print("working", flush=True)
        threading.Thread(target=self.wait, daemon=True).start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        for index in range(PAGES):
            assert os.pread(self.written, PAGE, index * PAGE) == page(1, index, self.versions[index])
        print(json.dumps({"slowest_seconds": self.slowest_seconds, **self.counts}))

    def wait(self) -> None:
        sys.stdin.read()
        self.over.set()


if __name__ == "__main__":
    Storm(Path(sys.argv[1])).run()
