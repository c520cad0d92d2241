"""The command ``tmem``: the group, its table of commands, and how errors reach a person.

A command's module is imported only when that command runs (a swap server should not pay for FUSE), so the
table carries the one-line helps. Not for any command itself. Exit status: 0 done, 1 failed (one line on
stderr that says what to do), 2 wrong usage, 130 interrupted. ``TMEM_DEBUG=1`` shows the traceback instead.
"""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

from tmem.errors import TmemError


@dataclass(frozen=True)
class Entry:
    """Where a command stands and what the overview says about it."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "start": Entry("tmem.cli.service", "start", "Create the segment if absent and run the manager service."),
    "stop": Entry("tmem.cli.service", "stop", "Stop the manager; pages and servers stay."),
    "restart": Entry("tmem.cli.restart", "restart", "Go on with the installed version, while all is in use."),
    "swap": Entry("tmem.cli.swap", "swap", "Add, serve and remove swap devices."),
    "mount": Entry("tmem.cli.mount", "mount", "Mount a directory through the precache."),
    "umount": Entry("tmem.cli.mount", "umount", "Unmount such a directory."),
    "list": Entry("tmem.cli.list", "list_command", "Show memory, clients and pools."),
    "top": Entry("tmem.cli.top", "top", "Show live what happens in the segment."),
    "resize": Entry("tmem.cli.service", "resize", "Give the segment another bound, or a range for it."),
    "freeable": Entry("tmem.cli.list", "freeable", "Print the memory that persistent pages could still get."),
    "metrics": Entry("tmem.cli.metrics", "metrics", "Serve or print the statistics for Prometheus."),
    "set": Entry("tmem.cli.settings", "set_command", "Set a client's weight, cap, floor or compression."),
    "authorise": Entry("tmem.cli.settings", "authorise", "Allow a client to share an ephemeral pool."),
    "freeze": Entry("tmem.cli.control", "freeze", "Refuse new pages of a client, or of everybody."),
    "thaw": Entry("tmem.cli.control", "thaw", "End a freeze."),
    "off": Entry("tmem.cli.control", "off", "Freeze, and drop the ephemeral pages."),
    "on": Entry("tmem.cli.control", "on", "Allow everything again, after off or freeze."),
    "flush": Entry("tmem.cli.control", "flush", "Evict ephemeral pages and give the memory to the system."),
    "shrink": Entry("tmem.cli.swap", "shrink", "Bring the pages of a local swap device back into RAM."),
    "destroy": Entry("tmem.cli.service", "destroy", "End a client, or the whole segment, with its pages."),
    "save": Entry("tmem.cli.save", "save", "Write clients and their pages to a file."),
    "restore": Entry("tmem.cli.save", "restore", "Make the clients of such a file."),
    "handoff": Entry("tmem.cli.save", "handoff", "Move a working client to another segment."),
    "receive": Entry("tmem.cli.save", "receive", "Take such a client; run by handoff."),
    "contain": Entry("tmem.cli.contain", "contain", "Limit everything else, so that local swap cannot hang."),
    "balloon": Entry("tmem.cli.balloon", "balloon", "Have a control group swap out what it does not use."),
    "watermarks": Entry("tmem.cli.contain", "watermarks", "Let the kernel keep more memory free."),
    "doctor": Entry("tmem.cli.doctor", "doctor", "Check the machine, the segment and the manager."),
    "bench": Entry("tmem.cli.bench", "bench", "Measure this machine, beside what one would use instead."),
    "install": Entry("tmem.cli.install", "install", "Write unit files for systemd and the mount helper."),
}
"""Every command, in the order of the overview."""


class LazyGroup(click.Group):
    """A group that knows its commands by `COMMANDS` and imports a module only to run its command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command called `cmd_name`, or None."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        command.short_help = entry.help
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begin with; a usage error with one like it if there is none."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else "'tmem --help' lists them"
            ctx.fail(f"there is no command {name!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview from the table, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--name", envvar="TMEM_NAME", default="default", show_default=True, help="The segment to use.")
@click.option("--config", metavar="FILE", help="Configuration, in place of /etc/tmem.toml (TMEM_CONFIG).")
@click.version_option(package_name="tmem", prog_name="tmem")
@click.pass_context
def cli(ctx: click.Context, name: str, config: str | None) -> None:
    """Transcendent memory: a swap device and a file precache on one compressed pool manager."""
    from tmem.config.place import chosen_file

    ctx.obj = {"name": name, "config": chosen_file(config)}


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        status = cli.main(list(arguments), prog_name="tmem", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader of our output has left; keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("TMEM_DEBUG"):
            raise
        click.echo(f"tmem: {_told(error)}", err=True)
        return 1
    return status if isinstance(status, int) else 0


def _told(error: Exception) -> str:
    """Return in one line what went wrong, and what to do where the error itself does not say it."""
    if isinstance(error, TmemError):
        return str(error)
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        if error.filename is None:
            return what
        remedy = "; run this as root" if isinstance(error, PermissionError) and os.geteuid() else ""
        return f"{os.fsdecode(error.filename)!r}: {what}{remedy}"
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"this is a fault of tmem ({said}): TMEM_DEBUG=1 shows where; please report that"


def main() -> None:
    """Run the command line of this process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path is printed as the bytes that it is
    enter_group()
    sys.exit(run(sys.argv[1:]))


def enter_group() -> None:
    """Join tmem's control group on a contained machine.

    What a command touches first in the segment, and its stack while it holds a lock, are not to be swapped
    out to a device of the segment.
    """
    from tmem.backends import groups

    groups.enter()


if __name__ == "__main__":
    main()
