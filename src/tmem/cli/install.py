"""The command ``install``: unit files for systemd, mount(8)'s helper for ``fuse.tmem``, texts for people.

The units stand as templates in ``tmem/units``; only the path of the command and the segment's name are filled
in. What is not marked as ours is never overwritten or removed, and everything is checked before anything is
written. Not for starting or enabling anything: the command says how. Threading: none.
"""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import click

from tmem.backends.paths import check_name
from tmem.cli import pages
from tmem.cli.context import segment_name
from tmem.config.example import example
from tmem.errors import TmemError

MARKER = "# Written by 'tmem install', which overwrites it: change it by 'systemctl edit'."
"""The first line of every file that is ours."""

UNITS = Path("etc/systemd/system")
CONFIGURATION = Path("etc/tmem.toml")
HELPER = "mount.fuse.tmem"

# systemd, the shell and a script's first line would each want another way of quoting.
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-")
_COMMON = ("tmem.slice", "tmem@.service", "run-tmem.mount.d/tmem.conf")


@dataclass(frozen=True)
class Unit:
    """A unit file, or settings for a unit: its path below UNITS and its text."""

    name: str
    text: str


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), help="Install below DIR.")
@click.option("--command", type=click.Path(path_type=Path), help="Path of tmem in the units; with --root.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option("--uninstall", is_flag=True, help="Remove what install has written, of every segment.")
@click.pass_context
def install(ctx: click.Context, root: Path, command: Path | None, dry_run: bool, uninstall: bool) -> None:
    """Write the units of the segment for systemd, and let mount(8) and fstab know fuse.tmem.

    Completions for shells and man pages as well, and a commented /etc/tmem.toml where there is none.

    With another segment (tmem --name NAME install) they are called tmem-swap-NAME@ and so on.
    """
    root = root.absolute()
    if uninstall:
        _uninstall(root, dry_run)
        return
    segment = check_name(segment_name(ctx), "segment name")
    tmem = checked_command(command or find_command())
    wanted = {root / UNITS / unit.name: unit.text for unit in render(segment, tmem)}
    wanted |= {root / path: text for path, text in pages.everything().items()}
    link = helper_link(root)
    _check(root, list(wanted), link)
    would = "would " if dry_run else ""
    for path, text in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            click.echo(f"{path} is as it should be")
            continue
        click.echo(f"{would}write {path}")
        if not dry_run:
            _write(path, text)
    target = tmem.with_name(HELPER)
    if link.is_symlink() and link.readlink() == target:
        click.echo(f"{link} is as it should be")
    else:
        click.echo(f"{would}link {link} to {target}")
        if not dry_run:
            _link(link, target)
    configuration = root / CONFIGURATION
    if configuration.exists():
        same = configuration.read_bytes() == example().encode()
        click.echo(f"{configuration} {'is as it should be' if same else 'stays as somebody has made it'}")
    else:
        click.echo(f"{would}write {configuration}")
        if not dry_run:
            _write(configuration, example())
    if not dry_run:
        click.echo(_advice(segment), err=True)


def render(segment: str, command: Path) -> list[Unit]:
    """Return the units of `segment`, in the order of their names; `command` is the path of tmem."""
    suffix = "" if segment == "default" else f"-{segment}"
    values = {"@COMMAND@": str(command), "@SEGMENT@": segment, "@SUFFIX@": suffix}
    units = []
    for source in sorted(resources.files("tmem").joinpath("units").iterdir(), key=lambda file: file.name):
        text = f"{MARKER}\n{source.read_text(encoding='utf-8')}"
        for mark, value in values.items():
            text = text.replace(mark, value)
        units.append(Unit(_unit_name(source.name, suffix), text))
    return units


def find_command() -> Path:
    """Return the path of the command that runs, or of the one beside this Python or on PATH."""
    on_path = shutil.which("tmem")
    for candidate in (Path(sys.argv[0]), Path(sys.executable).with_name("tmem"), Path(on_path or "/")):
        if candidate.name == "tmem" and candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.absolute()
    raise TmemError("the command tmem is not where this Python has its commands: install the package by pip")


def checked_command(command: Path) -> Path:
    """Return `command` if it can stand in a unit; else raise `TmemError`."""
    if not command.is_absolute():
        raise TmemError(f"{command} is not absolute: give --command the whole path")
    if not _PLAIN.issuperset(str(command)):
        raise TmemError(
            f"{command} cannot stand in a unit: install tmem under a path of letters, digits and ._+-"
        )
    return command


def helper_link(root: Path) -> Path:
    """Return where mount(8) looks for the helper: in /sbin, itself often a link, and nowhere else."""
    directory = root / "sbin"
    inside = directory.resolve().is_relative_to(root.resolve())
    return (directory if inside else root / "usr/sbin") / HELPER


def _unit_name(source: str, suffix: str) -> str:
    """Return the name of a unit for another segment: ``tmem-swap-NAME@.service``; some are for all."""
    if source.endswith(".conf"):  # settings for a unit that is not ours
        source = f"{source.removesuffix('.conf')}.d/tmem.conf"
    if source in _COMMON:
        return source
    stem, dot, kind = source.partition(".")
    return f"{stem.removesuffix('@')}{suffix}{'@' if stem.endswith('@') else ''}{dot}{kind}"


def _check(root: Path, wanted: list[Path], link: Path) -> None:
    """Raise `TmemError` if a file in the way is not ours, or if nothing can be written."""
    if not root.is_dir():
        raise TmemError(f"{root} is no directory: make it, or leave out --root")
    for path in wanted:
        if (path.exists() or path.is_symlink()) and not _is_ours(path):
            raise TmemError(f"{path} was not written by this command: move it away first")
    if (link.exists() or link.is_symlink()) and not _is_our_link(link):
        raise TmemError(f"{link} was not made by this command: move it away first")
    for directory in {path.parent: None for path in (*wanted, link)}:
        if not os.access(_existing(directory), os.W_OK):
            raise TmemError(
                f"{directory} is not writable: run this as root, or install elsewhere with --root"
            )


def _uninstall(root: Path, dry_run: bool) -> None:
    directory = root / UNITS
    units = [
        path
        for path in sorted(
            [*directory.glob("tmem*"), *directory.glob("*.d/tmem.conf"), *pages.candidates(root)]
        )
        if _is_ours(path)
    ]
    names = {path.name for path in units}
    for enabled in sorted(directory.glob("*.*/tmem*")):
        if enabled.is_symlink() and enabled.readlink().name in names:
            raise TmemError(
                f"{enabled.name} is enabled: take it out of use with 'systemctl disable --now {enabled.name}'"
            )
    link = helper_link(root)
    if _is_our_link(link):
        units.append(link)
    configuration = root / CONFIGURATION
    if configuration.is_file() and configuration.read_bytes() == example().encode():  # nobody has edited it
        units.append(configuration)
    if not units:
        click.echo(f"nothing of ours is installed below {root}")
    for path in units:
        click.echo(f"{'would ' if dry_run else ''}remove {path}")
        if not dry_run:
            path.unlink()
            if path.parent.suffix == ".d":
                with contextlib.suppress(OSError):  # somebody else has settings there
                    path.parent.rmdir()
    if units and not dry_run:
        click.echo("next: systemctl daemon-reload", err=True)


def _is_ours(path: Path) -> bool:
    """Say whether a file carries a marker of ours, in its first line or, where that is taken, the second."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file.readline(), file.readline()
    return any(line.rstrip("\n") in (MARKER, pages.MARKER, pages.MANUAL_MARKER) for line in lines)


def _is_our_link(path: Path) -> bool:
    """Say whether `path` links to a helper of ours, which may be gone with its environment."""
    return path.is_symlink() and path.readlink().name == HELPER


def _existing(directory: Path) -> Path:
    """Return `directory` or the nearest of its parents that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")  # systemd never sees half a unit
    fresh.write_text(text, encoding="utf-8")
    fresh.chmod(0o644)
    fresh.replace(path)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)


def _advice(segment: str) -> str:
    suffix = "" if segment == "default" else f"-{segment}"
    return f"""next: systemctl daemon-reload, and of these what you need, OPTIONS as each unit file says:
  the segment         /etc/tmem/{segment}.conf, systemctl enable --now tmem@{segment}
  swap of this system /etc/tmem/swap{suffix}-NAME.conf, systemctl enable --now tmem-contain{suffix} tmem-swap{suffix}@NAME
  a guest's swap      /etc/tmem/export{suffix}-NAME.conf, systemctl enable --now tmem-export{suffix}@NAME
  a mount             /etc/tmem/mount{suffix}-NAME.conf, systemctl enable --now tmem-mount{suffix}@NAME; or a line in fstab"""  # noqa: E501
