"""A sample of the comparison with other lower file systems than ext4, as a mount is shipped.

On a tmpfs the times of directories are coarse, so there it is scenarios alone.
"""

from collections.abc import Callable, Iterator

import pytest

from ..images import file_system
from . import test_scenarios as scenarios
from .compare import OTHER, Actor, Twins, User
from .conftest import SHIPPED, mounted
from .test_table import cases, differences

STORIES = [
    scenarios.test_a_mapping_of_a_file_that_shrinks_and_grows,
    scenarios.test_a_number_that_is_used_again_is_another_file,
    scenarios.test_a_read_that_hits_shows_in_the_access_time,
    scenarios.test_an_old_handle_opens_no_other_file,
    scenarios.test_direct_access,
    scenarios.test_listings_have_every_name_and_the_dots,
    scenarios.test_numbers_of_the_file_system,
    scenarios.test_private_mappings_keep_their_stores,
    scenarios.test_removing_a_directory_that_is_listed,
    scenarios.test_renaming_directories,
    scenarios.test_the_dots_have_the_numbers_of_the_directories,
    scenarios.test_truncating_opens_against_a_writer,
    scenarios.test_two_appenders_lose_nothing,
]


@pytest.fixture(scope="module", params=["btrfs", "xfs", "tmpfs"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Twins]:
    with file_system(request.param) as base, mounted(base, SHIPPED) as place:
        yield place


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("story", STORIES)
def test_scenario(story: Callable[[Twins], None], elsewhere: Twins) -> None:
    story(elsewhere)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("elsewhere", ["btrfs", "xfs"], indirect=True, scope="module")
@pytest.mark.parametrize("kind", ["listed_file", "linked_file", "file_in_sticky"])
def test_the_mount_does_as_the_lower_does(kind: str, elsewhere: Twins, actors: dict[User, Actor]) -> None:
    found = differences(elsewhere, actors, cases(kind, thin=True))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("elsewhere", ["xfs"], indirect=True, scope="module")
def test_what_is_known_to_differ_does(elsewhere: Twins, actors: dict[User, Actor]) -> None:
    found = differences(elsewhere, actors, [("set_id_program", "truncate_same", OTHER)])
    assert found
    assert all("ctime is 'changed' instead of 'as before'" in line for line in found)
