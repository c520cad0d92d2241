"""Whether a file system's time stamps are fine is judged by rounds that were quick enough to tell."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmem.fs.identity import Round, Version, are_fine, has_fine_stamps, version_object_id, version_of

MS = 1_000_000
SLOW, QUICK = 5 * MS, MS // 50


@pytest.mark.parametrize(
    ("rounds", "fine"),
    [
        ([Round(8, QUICK)], True),
        ([Round(8, SLOW)] * 20 + [Round(8, QUICK)], True),
        ([Round(1, QUICK), Round(2, QUICK), Round(8, QUICK)], True),
        ([Round(1, QUICK)] * 3 + [Round(8, QUICK)], False),
        ([Round(8, SLOW), Round(1, QUICK)] * 3, False),
        ([Round(8, 300 * MS)] * 4 + [Round(8, QUICK)], False),
    ],
)
def test_rounds(rounds: list[Round], fine: bool) -> None:
    assert are_fine(rounds) is fine


def test_a_machine_that_is_busy_at_first_does_not_make_stamps_coarse(tmp_path: Path) -> None:
    def busy() -> Iterator[int]:
        now_ns = 0
        for look in itertools.count():
            now_ns += SLOW if look < 40 else QUICK
            yield now_ns

    clock = busy()
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        if not has_fine_stamps(directory):
            pytest.skip("time stamps are coarse here: needs Linux 6.13 and a file system that has fine ones")
        assert has_fine_stamps(directory, lambda: next(clock))
    finally:
        os.close(directory)


def test_versions_of_any_time_have_names(runtime_dir: Path) -> None:
    """Whoever owns a file can give it a time of which 64 bits of nanoseconds know nothing, on tmpfs say."""
    path = runtime_dir / "far"
    versions = [Version(0, 0, 0)]
    for second in (20_000_000_000, 20_000_000_001, -20_000_000_000):
        path.touch()
        os.utime(path, (second, second))
        versions.append(version_of(path.stat()))
    path.unlink()
    assert max(version.mtime_ns for version in versions) > 1 << 63
    assert len({version_object_id(bytes(24), version) for version in versions}) == 4
