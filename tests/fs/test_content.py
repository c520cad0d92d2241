"""Content: what is written through the mount or underneath is what is read, with every way of access."""

import mmap
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tmem.types import PAGE_SIZE

from .conftest import Mounter, Place
from .rings import BY_RINGS

MIB = 1 << 20


@pytest.fixture(params=["loop=plain", "loop=fast", "loop=native", BY_RINGS, "cache=kernel"])
def any_place(request: pytest.FixtureRequest, mounter: Mounter) -> Place:
    """The same mount with each way to wait for requests, and with the kernel's cache."""
    place = mounter(f"timeout=0,{request.param}")
    place.kernel_caches = request.param == "cache=kernel"
    return place


def test_reads_of_any_offset_and_size(any_place: Place) -> None:
    content = random.Random(1).randbytes(3 * MIB + 777)
    (any_place.lower / "file").write_bytes(content)
    generator = random.Random(2)
    with (any_place.point / "file").open("rb", buffering=0) as file:
        for _ in range(200):
            start, size = (
                generator.randrange(len(content) + 5000),
                generator.choice([1, 100, 4096, 70000, 2 * MIB]),
            )
            expected = content[start : start + size]
            got = b""
            while piece := os.pread(file.fileno(), size - len(got), start + len(got)):
                got += piece
            assert got == expected
    assert (any_place.point / "file").read_bytes() == content


def test_writes_of_any_offset_and_size(any_place: Place) -> None:
    model = bytearray()
    generator = random.Random(3)
    with (any_place.point / "file").open("w+b", buffering=0) as file:
        for _ in range(100):
            start, size = generator.randrange(300_000), generator.choice([1, 100, 4096, 70000])
            data = generator.randbytes(size)
            assert os.pwrite(file.fileno(), data, start) == size
            model.extend(bytes(max(start + size - len(model), 0)))
            model[start : start + size] = data
        assert os.pread(file.fileno(), len(model) + 1, 0) == model
    assert (any_place.lower / "file").read_bytes() == model == (any_place.point / "file").read_bytes()


def test_truncate_grow_and_holes(any_place: Place) -> None:
    path = any_place.point / "file"
    path.write_bytes(b"x" * 10_000)
    os.truncate(path, 5000)
    assert path.read_bytes() == b"x" * 5000
    os.truncate(path, 9000)
    assert path.read_bytes() == b"x" * 5000 + bytes(4000)
    with path.open("r+b") as file:
        file.truncate(100)
        file.seek(50_000)
        file.write(b"end")
    assert path.read_bytes() == b"x" * 100 + bytes(49_900) + b"end"
    path.open("w").close()
    assert path.stat().st_size == 0 == (any_place.lower / "file").stat().st_size


def test_appends_go_to_the_end_even_if_the_file_grew_underneath(any_place: Place) -> None:
    path = any_place.point / "log"
    with path.open("ab", buffering=0) as file:
        file.write(b"one ")
        with (any_place.lower / "log").open("ab") as other:
            other.write(b"two ")
        file.write(b"three")
    assert (any_place.lower / "log").read_bytes() == b"one two three" == path.read_bytes()


def test_unlinked_files_live_until_they_are_closed(any_place: Place) -> None:
    path = any_place.point / "file"
    path.write_bytes(b"still here")
    with path.open("r+b", buffering=0) as file:
        path.unlink()
        assert not (any_place.lower / "file").exists()
        assert file.read() == b"still here"
        file.write(b"!")
        file.truncate(5)
        os.fchmod(file.fileno(), 0o600)
        assert os.fstat(file.fileno()).st_size == 5
        assert os.fstat(file.fileno()).st_nlink == 0


def test_a_reader_sees_a_file_grow(any_place: Place) -> None:
    with (any_place.lower / "log").open("ab", buffering=0) as writer:
        writer.write(b"first")
        with (any_place.point / "log").open("rb", buffering=0) as reader:
            assert reader.read(100) == b"first"
            assert reader.read(100) == b""
            writer.write(b" second" * 1000)
            found = b""

            # The report of a change that comes in between makes the kernel drop the size it asked for.
            def read_on() -> bool:
                nonlocal found
                found += reader.read(100_000)
                return len(found) >= 7000 or not any_place.kernel_caches

            wait_until(read_on)
            assert found == b" second" * 1000


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_mapped_reads(any_place: Place, flags: int) -> None:
    content = random.Random(4).randbytes(100_000)
    (any_place.lower / "file").write_bytes(content)
    with (
        (any_place.point / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == content


def test_mapped_writes_arrive(any_place: Place) -> None:
    path = any_place.point / "file"
    path.write_bytes(bytes(3 * PAGE_SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5000:5005] = b"hello"
        mapped.flush()
        assert os.pread(file.fileno(), 5, 5000) == b"hello"
    assert (any_place.lower / "file").read_bytes()[5000:5005] == b"hello"


def test_programs_run(any_place: Place) -> None:
    (any_place.point / "program").write_bytes(Path("/bin/true").read_bytes())
    (any_place.point / "program").chmod(0o755)
    subprocess.run([any_place.point / "program"], check=True, timeout=60)


def test_sync_and_special_opens(any_place: Place) -> None:
    path = any_place.point / "file"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_SYNC, 0o644)
    os.write(descriptor, b"x" * 5000)
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    os.close(descriptor)
    directory = os.open(any_place.point, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    with pytest.raises(FileExistsError):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert path.read_bytes() == b"x" * 5000


def test_many_readers_and_writers_at_once(any_place: Place) -> None:
    contents = {f"{number}": random.Random(number).randbytes(400_000) for number in range(6)}
    for name, content in contents.items():
        (any_place.lower / name).write_bytes(content)
    failures = []

    def work(name: str, content: bytes) -> None:
        for round_number in range(3):
            if (any_place.point / name).read_bytes() != content:
                failures.append(name)
            (any_place.point / f"{name}-{round_number}").write_bytes(content)

    threads = [threading.Thread(target=work, args=item) for item in contents.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all((any_place.lower / f"{name}-2").read_bytes() == content for name, content in contents.items())


def test_copies_by_other_programs(any_place: Place, tmp_path: Path) -> None:
    (any_place.lower / "file").write_bytes(random.Random(5).randbytes(2 * MIB + 1))
    subprocess.run(["cp", any_place.point / "file", any_place.point / "copy"], check=True, timeout=60)
    subprocess.run(["cmp", any_place.lower / "file", any_place.lower / "copy"], check=True, timeout=60)
    with (any_place.point / "direct").open("wb", buffering=0) as file, mmap.mmap(-1, MIB) as aligned:
        aligned[:5] = b"hello"
        descriptor = os.open(any_place.point / "direct", os.O_RDWR | os.O_DIRECT)
        assert os.pwrite(descriptor, aligned, 0) == MIB
        assert os.preadv(descriptor, [aligned], 0) == MIB
        os.close(descriptor)
        assert file.tell() == 0
    assert (any_place.lower / "direct").stat().st_size == MIB
