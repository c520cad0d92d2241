"""Changes underneath of other lower file systems than ext4 show as they do there: a sample."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tmem.types import PAGE_SIZE

from . import test_kernel_caching as kernel_caching
from . import underneath
from .conftest import Mounter, Place
from .images import file_system

if TYPE_CHECKING:
    from tmem.backends import _native

pytestmark = pytest.mark.usefixtures("root")

STORIES = [
    kernel_caching.test_a_directory_s_listing_changes,
    kernel_caching.test_another_file_under_the_same_name,
    kernel_caching.test_names_change,
    kernel_caching.test_the_kernel_answers_by_itself,
]


@pytest.fixture(scope="module", params=["btrfs", "xfs", "tmpfs"])
def base(request: pytest.FixtureRequest) -> Iterator[Path]:
    with file_system(request.param) as directory:
        yield directory


@pytest.fixture(params=["direct", "kernel"])
def place(
    request: pytest.FixtureRequest, base: Path, segment: "_native.Segment", mounter: Mounter, tmp_path: Path
) -> Place:
    made = mounter(f"client=web,cache={request.param}", lower=base / tmp_path.name)
    assert made.statistics().watching
    (made.lower / "directory").mkdir()
    (made.lower / "file").write_bytes(b"o" * 2 * PAGE_SIZE)
    return made


@pytest.mark.parametrize("story", STORIES)
def test_names_and_attributes(
    story: Callable[..., None], place: Place, eventually: Callable[..., None]
) -> None:
    story(place, eventually)


def test_content(place: Place, eventually: Callable[..., None]) -> None:
    """Of a file that is held open, and that is read from the pool in between."""
    lower = place.lower / "file"
    with (place.point / "file").open("rb", buffering=0) as file:
        for change in (
            lambda: underneath.write(lower, 5, b"new"),
            lambda: underneath.write_unnoticed(lower, b"again"),
            lambda: underneath.punch(lower, 0, PAGE_SIZE),
            lambda: underneath.store(lower, b"stored"),
            lambda: lower.write_bytes(b"short"),
        ):
            for _ in range(2):
                file.seek(0)
                assert file.read() == lower.read_bytes()
            change()

            eventually(lambda: (place.point / "file").read_bytes() == lower.read_bytes())
    assert place.statistics().noticed_changes > 0
