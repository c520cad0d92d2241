"""Every operation of the table, on every kind of object: the mount does as the lower does.

Two kinds are tried by all users; for the others users take turns. The full product is a slow test. What is
known to differ is listed, with the reason; it is listed only as long as it does.
"""

import itertools
import os
from collections.abc import Container, Iterable, Iterator

import pytest

from tmem.fs import device

from .compare import OTHER, USERS, Actor, Twins, User
from .kinds import KINDS
from .table import CONTENTS, OPERATIONS

SET_IDS = "stores to a shared mapping arrive as writes; which take set-id bits and capabilities, to be safe"
KNOWN: dict[tuple[str, str], str] = {
    ("set_id_program", "map_and_write"): SET_IDS,
    ("set_gid_file", "map_and_write"): SET_IDS,
    ("capable_file", "map_and_write"): SET_IDS,
    ("set_gid_file", "chown_nobody"): "the kernel asks for no change at all, which cannot be refused to some",
    ("capable_file", "truncate_much"): "the kernel takes the capabilities away before it asks for the size",
}
WAITING = () if hasattr(device, "_DONT_MASK") else ("nothing_in_listed", "listed_directory")
"""Default access control lists need the caller's umask to come with the request, not applied to the mode."""

PASSED = ("file", "nothing", "set_gid_file", "capable_file", "listed_file", "linked_file", "sparse_file")
"""Kinds that are tried with files passed through: stores to a mapping are then what they are on the lower."""
NOT_PASSED = [("set_gid_file", "map_and_write"), *(case for case in KNOWN if case[1] != "map_and_write")]

ALL_USERS = ("file", "nothing")
Case = tuple[str, str, User]


def cases(kind: str, thin: bool, known: Container[tuple[str, str]] = KNOWN) -> Iterator[Case]:
    """Yield what is to be tried on a kind."""
    for number, operation in enumerate(OPERATIONS):
        turn = (number + list(KINDS).index(kind)) % len(USERS)
        users = USERS if not thin or kind in ALL_USERS else (USERS[turn],)
        if (kind, operation) not in known and kind not in WAITING:
            yield from ((kind, operation, user) for user in users)


def differences(place: Twins, actors: dict[User, Actor], chosen: Iterable[Case]) -> list[str]:
    found = []
    for kind, operation, user in chosen:
        name = place.stage(KINDS[kind])
        lines = place.compare(name, lambda root: actors[user].do(operation, root))  # noqa: B023
        found += [f"{operation} of {kind} by {user.name}: {line}" for line in lines]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_mount_does_as_the_lower_does(kind: str, twins: Twins, actors: dict[User, Actor]) -> None:
    chosen = cases(kind, thin=True)
    if twins.contents_only:
        chosen = (case for case in chosen if case[1] in CONTENTS)
    found = differences(twins, actors, chosen)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("kind", PASSED)
def test_it_does_so_with_files_that_are_passed_through(
    kind: str, passing: Twins, actors: dict[User, Actor]
) -> None:
    thin = "TMEM_ALL_CASES" not in os.environ
    found = differences(passing, actors, cases(kind, thin, NOT_PASSED))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.skipif("TMEM_ALL_CASES" not in os.environ, reason="needs TMEM_ALL_CASES=1: takes some minutes")
def test_the_full_product(twins: Twins, actors: dict[User, Actor]) -> None:
    everything = itertools.chain.from_iterable(cases(kind, thin=False) for kind in KINDS)
    found = differences(twins, actors, everything)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(("kind", "operation"), KNOWN)
def test_what_is_known_to_differ_does(
    kind: str, operation: str, twins: Twins, actors: dict[User, Actor]
) -> None:
    assert differences(twins, actors, [(kind, operation, OTHER)])
