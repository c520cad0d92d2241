"""Files to measure with: the machine's own programs and libraries, because data decide ratios."""

import random
from collections.abc import Iterator
from pathlib import Path

_PLACES = ("/usr/lib/x86_64-linux-gnu", "/usr/bin", "/usr/lib/python3", "/usr/share", "/usr/lib")
_TEXTS = ("/usr/lib/python3.11", "/usr/lib/python3", "/usr/share/perl", "/usr/include")


def _sources(places: tuple[str, ...], smallest: int) -> Iterator[Path]:
    seen: set[int] = set()
    for place in places:
        for path in sorted(Path(place).rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            if status.st_size >= smallest and status.st_ino not in seen:
                seen.add(status.st_ino)
                yield path


def real_file(path: Path, size: int) -> None:
    """Fill one file of `size` bytes from programs and libraries. RuntimeError if there are too few."""
    left = size
    with path.open("wb") as out:
        for source in _sources(_PLACES, 1):
            left -= out.write(source.read_bytes()[:left])
            if not left:
                return
    raise RuntimeError("this machine has too few programs to make a file of")


def real_files(directory: Path, size: int) -> list[Path]:
    """Copy programs and libraries of 16 KiB and more into `directory`, until they make `size` bytes."""
    copies: list[Path] = []
    left = size
    for source in _sources(_PLACES, 16 << 10):
        content = source.read_bytes()[:left]
        copies.append(directory / f"{len(copies):05}-{source.name}")
        copies[-1].write_bytes(content)
        left -= len(content)
        if not left:
            return copies
    raise RuntimeError("this machine has too few programs to make files of")


def tree(directory: Path, nfiles: int, ndirectories: int) -> None:
    """Make small files of 200 to 8,000 bytes of source code, in directories two levels deep."""
    generator = random.Random(1)
    text = b"".join(path.read_bytes() for path in _some_texts(32 << 20))
    places = [directory / f"d{number % 20}" / f"e{number}" for number in range(ndirectories)]
    for place in places:
        place.mkdir(parents=True)
    for number in range(nfiles):
        length = generator.randint(200, 8000)
        start = generator.randrange(len(text) - length)
        (places[number % ndirectories] / f"file{number}.txt").write_bytes(text[start : start + length])


def _some_texts(size: int) -> Iterator[Path]:
    for source in _sources(_TEXTS, 200):
        if size > 0 and source.suffix in (".py", ".h", ".pm"):
            size -= source.stat().st_size
            yield source
