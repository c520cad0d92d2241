"""Commands follow the configuration, less than the environment, less than the command line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tmem.backends import _native
from tmem.cli.configured import ConfiguredCommand, explicit
from tmem.cli.main import cli, run

from .conftest import Tmem


@pytest.fixture
def config(tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that is in force, empty to begin with."""
    path = tmp_path / "tmem.toml"
    path.touch()
    monkeypatch.setenv("TMEM_CONFIG", str(path))
    return path


def taken(words: list[str], parameters: dict[str, object]) -> None:
    """Parse a command line as ``tmem WORDS`` does; put the values of its command into `parameters`."""
    with cli.make_context("tmem", [*words]) as context:
        click.Command.invoke(cli, context)  # the group's own part
        name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        while isinstance(command, click.Group):
            inner = command.get_command(context, rest.pop(0))
            assert inner is not None
            command = inner
        with command.make_context(name, rest, parent=context) as made:
            assert isinstance(command, ConfiguredCommand)
            parameters.update(
                {**made.params, "explicit": {one for one in made.params if explicit(made, one)}}
            )


def test_command_line_then_environment_then_drop_ins_then_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(*words: str) -> object:
        found: dict[str, object] = {}
        taken(["start", *words], found)
        size = found["memory"]
        return size and str(size), "memory" in str(found["explicit"])

    assert memory() == (None, False)
    config.write_text('[start]\nmemory = "16M"\n')
    assert memory() == (str(16 << 20), False)
    config.with_suffix(".d").mkdir()
    (config.with_suffix(".d") / "a.toml").write_text('[start]\nmemory = "17M"\n')
    assert memory() == (str(17 << 20), False)
    monkeypatch.setenv("TMEM_START_MEMORY", "18M")
    assert memory() == (str(18 << 20), True)
    assert memory("--memory", "16M..19M") == (f"{16 << 20}..{19 << 20}", True)


def test_a_device_has_the_defaults_of_all_and_then_its_own(config: Path) -> None:
    config.write_text(
        "[swap]\nreserve = true\npriority = 5\ndiscard = false\n"
        '[client.web1.swap]\nsize = "64M"\npriority = 7\nattach = true\n[client.web2.swap]\nsize = "32M"\n'
    )
    found: dict[str, object] = {}
    taken(["swap", "add", "web1"], found)
    assert (found["size_bytes"], found["priority"], found["local"]) == (64 << 20, 7, True)
    assert (found["reserve"], found["discard"]) == (True, False)
    taken(["swap", "add", "web2", "--size", "1M", "--discard"], found)
    assert (found["size_bytes"], found["priority"], found["local"]) == (1 << 20, 5, False)
    assert found["discard"] is True


def test_what_is_wrong_keeps_nobody_from_looking(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config.write_text("[start]\nmemroy = 1\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for words in (
        ["start"],
        ["swap", "add", "web1", "--size", "1M"],
        ["mount", str(tmp_path / "a"), str(tmp_path / "b")],
    ):
        assert run(words) == 1
        said = capsys.readouterr().err
        assert said == f"tmem: {config}:2: there is no 'memroy' in [start]: did you mean 'memory'?\n"
    for words in (["start", "--help"], ["swap", "add", "-h"], ["mount", "--help"]):
        assert run(words) == 0
    capsys.readouterr()
    assert run(["list"]) == 1
    assert "no segment" in capsys.readouterr().err
    run(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [one for one in findings if one["group"] == "configuration"]
    assert (found["state"], f"{config}:2" in found["detail"], str(config) in found["remedy"]) == (
        "missing",
        True,
        True,
    )


def test_a_file_that_is_named_must_be_there(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--config", "/nonexistent/tmem.toml", "start"]) == 1
    assert "there is no configuration /nonexistent/tmem.toml" in capsys.readouterr().err


def test_a_manager_follows_it(
    tmem: Tmem, config: Path, runtime_dir: Path, eventually: Callable[..., None]
) -> None:
    config.write_text('[start]\nmemory = "16M"\n[client.web1]\nweight = 7\nfloor = "1M"\n')
    started = tmem("start", "-d")
    assert "(16M) runs" in started.out, started.err
    segment = _native.attach(str(runtime_dir / "default"))
    try:
        web1, web2 = segment.client("web1"), segment.client("web2")
        eventually(lambda: web1.weight == 7)
        assert (web1.floor_bytes, web2.weight) == (1 << 20, 100)
        # What somebody sets afterwards stays, until the manager starts again; a floor is not lowered.
        web1.weight, web1.floor_bytes = 8, 2 << 20
        config.write_text('[start]\nmemory = "32M"\n[client.web1]\nweight = 9\n[client.web2]\ncap = "2M"\n')
        done = tmem("restart", "--manager")
        assert done.status == 0, done.err
        eventually(lambda: web1.weight == 9)
        eventually(lambda: web2.cap_bytes == 2 << 20)
        assert web1.floor_bytes == 2 << 20
        assert segment.memory_bytes == 16 << 20  # how to create one, no more
        # A client that comes again under its name is another one.
        web1.destroy()
        again = segment.client("web1")
        eventually(lambda: again.weight == 9)
        # One that is wrong is not read; a manager that must start again goes on without it, beside the pages.
        config.write_text("[start]\nmemory = 'lots'\n")
        assert f"{config}:2" in tmem("restart", "--manager").err
        assert tmem("stop").status == 0
        started = tmem("start", "-d")
        assert (started.status, f"{config}:2" in started.err) == (0, True)
    finally:
        segment.close()
        tmem("destroy", "--all")
    assert tmem("start", "-d").status == 1


def test_mounts_begin_with_the_options_of_all(
    tmem: Tmem, config: Path, tmp_path: Path, root: None, eventually: Callable[..., None]
) -> None:
    config.write_text('[start]\nmemory = "16M"\n[mount]\noptions = ["ro", "client=everyone"]\n')
    for name in ("lower", "a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "x").write_bytes(os.urandom(1000))
    assert tmem("start", "-d").status == 0
    try:
        assert tmem("mount", str(tmp_path / "lower"), str(tmp_path / "a")).status == 0
        assert tmem("mount", str(tmp_path / "lower"), str(tmp_path / "b"), "-o", "client=b").status == 0
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "b" / "y").touch()
        names = {one["name"] for one in json.loads(tmem("list", "--json").out)["clients"]}
        assert names == {"everyone", "b"}
    finally:
        for name in ("a", "b"):
            tmem("umount", str(tmp_path / name))
        tmem("destroy", "--all")
