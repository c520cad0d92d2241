"""What ``tmem install`` writes: units that systemd accepts, and the helper of mount(8)."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest

from tmem.cli import install, pages
from tmem.cli.main import COMMANDS, run
from tmem.config.example import example
from tmem.errors import TmemError

from .conftest import Tmem

SYSTEM_UNITS = Path("/lib/systemd/system")
GENERATOR = Path("/lib/systemd/system-generators/systemd-fstab-generator")
STARTED = "tmem@default.service", "tmem-swap@web1.service", "tmem-contain.service"
"""What the boot of a machine that swaps to itself starts."""


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A ``tmem`` in a place of its own; its helper is beside it."""
    directory = tmp_path / "venv"
    directory.mkdir()
    for name, entry in (
        ("tmem", "tmem.cli.main import main"),
        ("mount.fuse.tmem", "tmem.cli.mount import helper"),
    ):
        path = directory / name
        path.write_text(f"#!{sys.executable}\nimport sys\nfrom {entry} as go\nsys.exit(go())\n")
        path.chmod(0o755)
    return directory / "tmem"


@pytest.fixture
def installed(tmp_path: Path, command: Path) -> Path:
    """The root directory of an installation."""
    root = tmp_path / "root"
    root.mkdir()
    assert run(["install", "--root", str(root), "--command", str(command)]) == 0
    return root


def files(root: Path) -> dict[str, str]:
    """Return every file and link below `root` with its content or target."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def verify(directories: list[Path], *units: str) -> str:
    """Return everything that systemd has to say against `units`."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    places = ":".join(map(str, [*directories, SYSTEM_UNITS]))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        env={**os.environ, "SYSTEMD_UNIT_PATH": places},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return result.stdout + result.stderr + ("" if result.returncode == 0 else f"status {result.returncode}")


def enable(units: Path, *names: str) -> None:
    """Do what ``systemctl enable`` does for instances of templates."""
    for name in names:
        template = re.sub(r"@[^.]*\.", "@.", name)
        wanted_by = re.findall(r"^WantedBy=(\S+)$", (units / template).read_text(), re.MULTILINE)
        assert wanted_by
        for target in wanted_by:
            (units / f"{target}.wants").mkdir(exist_ok=True)
            (units / f"{target}.wants" / name).symlink_to(units / template)


def test_it_writes_units_and_the_helper(installed: Path, command: Path) -> None:
    found = files(installed)
    texts = {path: found.pop(path) for path in [*found] if path.startswith("usr/share/")}
    assert {
        "usr/share/bash-completion/completions/tmem",
        "usr/share/zsh/vendor-completions/_tmem",
        "usr/share/fish/vendor_completions.d/tmem.fish",
        *(f"usr/share/man/man1/tmem-{name}.1" for name in (*COMMANDS, "swap-add", "swap-remove")),
        "usr/share/man/man1/tmem.1",
    } <= {*texts}
    assert set(found) == {
        "etc/systemd/system/run-tmem.mount.d/tmem.conf",
        "etc/systemd/system/tmem-contain.service",
        "etc/systemd/system/tmem-export@.service",
        "etc/systemd/system/tmem-mount@.service",
        "etc/systemd/system/tmem-swap@.service",
        "etc/systemd/system/tmem.slice",
        "etc/systemd/system/tmem@.service",
        "etc/tmem.toml",
        "sbin/mount.fuse.tmem",
    }
    assert found.pop("sbin/mount.fuse.tmem") == str(command.with_name("mount.fuse.tmem"))
    assert found.pop("etc/tmem.toml") == example()
    for text in found.values():
        assert text.startswith(install.MARKER)
        assert "@COMMAND@" not in text
        assert "@SEGMENT@" not in text
        assert "@SUFFIX@" not in text


@pytest.mark.parametrize(
    "unit",
    [*STARTED, "tmem.slice", "tmem-export@web1.service", "tmem-mount@files.service"],
)
def test_systemd_accepts_each_unit(installed: Path, unit: str) -> None:
    assert verify([installed / install.UNITS], unit) == ""


def test_systemd_accepts_the_units_of_another_segment(installed: Path, command: Path) -> None:
    assert run(["--name", "fast", "install", "--root", str(installed), "--command", str(command)]) == 0
    units = ["tmem@fast.service", "tmem-swap-fast@web1.service", "tmem-contain-fast.service"]
    units += ["tmem-export-fast@web1.service", "tmem-mount-fast@files.service"]
    assert verify([installed / install.UNITS], *units) == ""
    text = (installed / install.UNITS / "tmem-swap-fast@.service").read_text()
    assert "After=tmem@fast.service" in text
    assert "EnvironmentFile=-/etc/tmem/swap-fast-%i.conf" in text
    assert "--name fast swap add" in text


def test_the_check_would_find_a_wrong_unit(installed: Path) -> None:
    unit = installed / install.UNITS / "tmem@.service"
    unit.write_text(unit.read_text().replace("OOMPolicy=", "OOMPolice="))
    assert "OOMPolice" in verify([unit.parent], "tmem@default.service")


@pytest.mark.parametrize("late", [False, True])
def test_a_boot_with_all_of_it_has_no_ordering_cycle(installed: Path, tmp_path: Path, late: bool) -> None:
    """Swap, containment and a mount from fstab, which the local file systems wait for."""
    units, generated = installed / install.UNITS, tmp_path / "generated"
    if not GENERATOR.exists():
        pytest.skip("needs systemd's generator of mount units: apt-get install systemd")
    generated.mkdir()
    fstab = tmp_path / "fstab"
    fstab.write_text("/srv/files /mnt/files fuse.tmem ro,x-systemd.after=tmem@default.service 0 0\n")
    environment = {**os.environ, "SYSTEMD_FSTAB": str(fstab)}
    subprocess.run([GENERATOR, generated, generated, generated], env=environment, check=True, timeout=60)
    assert "Type=fuse.tmem" in (generated / "mnt-files.mount").read_text()
    enable(units, *STARTED, "tmem-mount@files.service", "tmem-export@web2.service")
    if late:  # what must not be: it would come after everything that comes after it
        unit = units / "tmem@.service"
        unit.write_text(unit.read_text().replace("[Service]", "After=local-fs.target\n[Service]"))
    said = verify([units, generated], "default.target", *STARTED, "mnt-files.mount")
    assert ("ordering cycle" in said) == late
    if not late:
        assert "tmem" not in said


def command_lines(units: Path) -> list[tuple[str, list[str]]]:
    """Return unit and words of every command line in the units."""
    found = []
    for unit in sorted(units.glob("tmem*")):
        for line in unit.read_text().splitlines():
            key, _, value = line.partition("=")
            if key.startswith("Exec"):
                found.append((unit.name, shlex.split(value.lstrip("-"))))
    return found


EXAMPLES = {
    "tmem@.service": "OPTIONS=--memory 64M",
    "tmem-swap@.service": "OPTIONS=--size 64M --priority 100",
    "tmem-export@.service": "OPTIONS=--size 64M --tcp 127.0.0.1:10809 --reserve",
    "tmem-mount@.service": "LOWER=/srv/files MOUNTPOINT=/mnt/files OPTIONS=rw",
    "tmem-contain.service": "OPTIONS=--room 128M",
}


def test_the_commands_in_the_units_exist(installed: Path, command: Path, tmem: Tmem) -> None:
    lines = command_lines(installed / install.UNITS)
    assert {unit for unit, _ in lines} == set(EXAMPLES)
    for unit, words in lines:
        assert words[0] == str(command)
        values = dict(re.findall(r"([A-Z]+)=(.*?)(?= [A-Z]+=|$)", EXAMPLES[unit]))
        arguments = []
        for word in words[1:]:
            if word == "$OPTIONS":
                arguments += values["OPTIONS"].split()
            else:
                arguments.append(Template(word).substitute(values).replace("%i", "web1"))
        # Every option is read before --help is obeyed, so one that does not exist is wrong usage.
        result = tmem(*arguments, "--help")
        assert result.status == 0, (unit, result.err)
    assert tmem("swap", "add", "web1", "--atach", "--help").status == 2


def test_the_options_in_the_comments_exist(installed: Path, tmem: Tmem) -> None:
    """What a unit file shows as an example can be given to its command."""
    subcommands = {
        "tmem@": ["start"],
        "tmem-swap@": ["swap", "add", "x"],
        "tmem-export@": ["swap", "add", "x"],
    }
    for name, words in {**subcommands, "tmem-contain": ["contain"]}.items():
        text = (installed / install.UNITS / f"{name}.service").read_text()
        (example,) = re.findall(r"^#   OPTIONS=(.*)$", text, re.MULTILINE)
        assert tmem(*words, *example.split(), "--help").status == 0, example


def test_again_changes_nothing(installed: Path, command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(installed)
    capsys.readouterr()
    assert run(["install", "--root", str(installed), "--command", str(command)]) == 0
    assert files(installed) == before
    out = capsys.readouterr().out
    assert out.count("is as it should be") == len(before)
    assert "write" not in out


def test_an_older_unit_and_a_moved_helper_are_replaced(installed: Path, command: Path) -> None:
    unit, link = installed / install.UNITS / "tmem.slice", installed / "sbin" / install.HELPER
    wanted = files(installed)
    unit.write_text(f"{install.MARKER}\n[Slice]\n")
    link.unlink()
    link.symlink_to("/gone/bin/mount.fuse.tmem")
    assert run(["install", "--root", str(installed), "--command", str(command)]) == 0
    assert files(installed) == wanted


@pytest.mark.parametrize("place", ["etc/systemd/system/tmem-swap@.service", "sbin/mount.fuse.tmem"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_not_ours_is_left_alone(
    tmp_path: Path, command: Path, place: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to("/dev/null")  # as 'systemctl mask' does
    else:
        path.write_text("[Unit]\n")
    before = files(tmp_path)
    assert run(["install", "--root", str(tmp_path), "--command", str(command)]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"tmem: .* by this command: move it away first\n", err)
    assert files(tmp_path) == before, "nothing is written if something is in the way"
    assert run(["install", "--root", str(tmp_path), "--uninstall"]) == 0
    assert files(tmp_path) == before


def test_a_dry_run_writes_nothing(tmp_path: Path, command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    arguments = ["install", "--root", str(root), "--command", str(command), "--dry-run"]
    assert run(arguments) == 0
    assert files(root) == {}
    out = capsys.readouterr().out
    assert out.count("would write") == 8 + 3 + len(pages.manual())
    assert out.count("would link") == 1
    assert run(arguments[:-1]) == 0
    before = files(root)
    assert run(["install", "--root", str(root), "--dry-run", "--uninstall"]) == 0
    assert files(root) == before


def test_uninstalling_removes_all_segments_and_only_ours(installed: Path, command: Path) -> None:
    assert run(["--name", "fast", "install", "--root", str(installed), "--command", str(command)]) == 0
    own = installed / install.UNITS / "tmem-own.service"
    own.write_text("[Service]\n")
    assert run(["install", "--root", str(installed), "--uninstall"]) == 0
    assert set(files(installed)) == {"etc/systemd/system/tmem-own.service"}


def test_uninstalling_waits_until_nothing_is_enabled(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enable(installed / install.UNITS, "tmem-swap@web1.service")
    before = files(installed)
    assert run(["install", "--root", str(installed), "--uninstall"]) == 1
    assert "systemctl disable --now tmem-swap@web1.service" in capsys.readouterr().err
    assert files(installed) == before


def test_a_link_to_another_directory_is_followed_only_inside(tmp_path: Path, command: Path) -> None:
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "sbin").symlink_to("usr/sbin")
    assert run(["install", "--root", str(tmp_path), "--command", str(command)]) == 0
    assert (tmp_path / "usr/sbin" / install.HELPER).is_symlink()
    (tmp_path / "sbin").unlink()
    (tmp_path / "sbin").symlink_to("/sbin")
    assert install.helper_link(tmp_path) == tmp_path / "usr/sbin" / install.HELPER


@pytest.mark.parametrize("path", ["/opt/my tmem/tmem", "/opt/50%/tmem", "/opt/$x/tmem", "bin/tmem"])
def test_a_path_that_cannot_stand_in_a_unit_is_refused(path: str) -> None:
    with pytest.raises(TmemError, match=r"cannot stand in a unit|not absolute"):
        install.checked_command(Path(path))


def test_it_finds_its_own_command() -> None:
    found = install.find_command()
    assert found.is_absolute()
    result = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.startswith("tmem")


def test_a_root_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["install", "--root", str(tmp_path / "none")]) == 1
    assert "is no directory" in capsys.readouterr().err
