"""The options after -o."""

import uuid

import pytest

from tmem.cli.mount import helper_arguments
from tmem.errors import TmemError
from tmem.fs import syscalls
from tmem.fs.options import Cache, Loop, MountOptions, default_client


def test_everything_at_once() -> None:
    pool = uuid.uuid4()
    words = [f"client=web,cache=direct,shared={pool}", "loop=plain,timeout=2.5,allow_other,ro"]
    options = MountOptions.parse(words, "/mnt")
    assert options.client == "web"
    assert options.shared == pool
    assert options.cache is Cache.DIRECT
    assert options.loop is Loop.PLAIN
    assert options.timeout_seconds == 2.5
    assert options.allow_other
    assert options.flags & syscalls.MS_RDONLY


def test_the_defaults_are_careful() -> None:
    options = MountOptions.parse([], "/mnt/data")
    assert options.client == "mnt-data"
    assert options.shared is None
    assert not options.allow_other
    assert options.flags == syscalls.MS_NOSUID | syscalls.MS_NODEV


def test_what_fstab_says_to_others_is_ignored() -> None:
    words = "rw,nofail,_netdev,x-systemd.automount,user,noauto,relatime,defaults"
    assert MountOptions.parse([words], "/mnt") == MountOptions.parse([], "/mnt")


@pytest.mark.parametrize(
    "word", ["colour=blue", "cache=maybe", "timeout=-1", "timeout=x", "client=a b", "client"]
)
def test_what_is_not_understood_is_refused(word: str) -> None:
    with pytest.raises(TmemError, match="use "):
        MountOptions.parse([word], "/mnt")


@pytest.mark.parametrize(
    ("point", "name"), [("/mnt/data", "mnt-data"), ("/", "root"), ("/a b/ü", "a-b"), ("/_x/.y", "x-y")]
)
def test_client_names_come_from_the_mount_point(point: str, name: str) -> None:
    assert default_client(point) == name


def test_long_mount_points_have_distinct_clients() -> None:
    names = {default_client("/" + "x" * 200 + str(number)) for number in range(3)}
    assert len(names) == 3
    assert all(len(name) <= 63 for name in names)


def test_the_helper_of_mount_speaks_our_language() -> None:
    assert helper_arguments(
        ["/lower", "/mnt", "-o", "rw,name=other,client=web", "-n", "-t", "fuse.tmem"]
    ) == [*("--name", "other", "mount", "/lower", "/mnt", "-o", "rw,client=web")]
