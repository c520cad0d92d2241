"""Who may do what: another user gets neither at the segment nor at the manager, with every directory open."""

import importlib
import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import pytest

from tmem.backends.paths import SegmentPaths
from tmem.backends.service import request
from tmem.cli.main import COMMANDS, run
from tmem.errors import ServiceError

from .conftest import Tmem

if TYPE_CHECKING:
    from tmem.backends import _native

NOBODY = 65534


def as_nobody(what: Callable[[], str]) -> str:
    """Return what `what` returns in a child of this process that is the user nobody."""
    for entry in COMMANDS.values():
        importlib.import_module(entry.module)  # the child may not be able to read them
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writer, what().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


def command(*arguments: str) -> Callable[[], str]:
    """Run a command line; ``STATUS OUTPUT``, both outputs together."""

    def go() -> str:
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            status = run(arguments)
        return f"{status} {output.getvalue()}"

    return go


def open_up(paths: SegmentPaths) -> None:
    """Open the directories and the socket to everybody, as nobody should."""
    paths.directory.chmod(0o755)
    paths.state.chmod(0o755)
    if paths.control.exists():
        paths.control.chmod(0o777)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["freeable"],
        ["freeze", "one"],
        ["off", "--all"],
        ["on", "--all"],
        ["flush", "--all"],
        ["set", "one", "--weight", "0"],
        ["authorise", "one", "12" * 16],
        ["destroy", "one"],
    ],
    ids=" ".join,
)
def test_clients_are_for_who_may_open_the_segment(segment: "_native.Segment", arguments: list[str]) -> None:
    client = segment.client("one")
    open_up(SegmentPaths.of("default"))
    said = as_nobody(command(*arguments))
    assert said == "1 tmem: segment 'default' belongs to user 0: run this as that user or as root\n"
    assert (segment.mode, client.mode, client.weight, client.authorised()) == ("on", "on", 100, [])


@pytest.mark.usefixtures("root")
def test_nobody_destroys_what_is_not_his(segment: "_native.Segment") -> None:
    open_up(SegmentPaths.of("default"))
    said = as_nobody(command("destroy", "--all"))
    assert said.startswith("1 tmem: cannot remove")
    assert segment.alive
    assert SegmentPaths.of("default").state.is_dir()


@pytest.mark.usefixtures("root")
def test_the_manager_knows_who_asks(tmem: Tmem) -> None:
    assert tmem("start", "-d", "--memory", "16M").status == 0
    paths = SegmentPaths.of("default")
    pid = request(paths, {"op": "ping"})["pid"]
    open_up(paths)

    def ask(message: dict[str, object]) -> Callable[[], str]:
        def go() -> str:
            try:
                return str(request(paths, message))
            except ServiceError as error:
                return f"refused: {error}"

        return go

    marker = paths.state / "marker"
    messages: list[dict[str, object]] = [
        {"op": "ping"},
        {"op": "stop"},
        {"op": "supervise", "name": "evil", "argv": ["touch", str(marker)], "env": {}},
        {"op": "dance"},
    ]
    for message in messages:
        said = as_nobody(ask(message))
        assert said == "refused: the manager is of user 0: run this as that user or as root"
    assert request(paths, {"op": "ping"})["pid"] == pid
    assert request(paths, {"op": "services"})["services"] == []
    assert not marker.exists()
