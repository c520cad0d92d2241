"""The command ``balloon``: have a control group give up cold pages before anybody needs the memory.

It waits, asks `tmem.nbd.balloon`, and prints when something changes. It runs until it is ended.
"""

import os
import time

import click

from tmem.cli.context import size_option
from tmem.errors import TmemError
from tmem.types import format_size


@click.command()
@click.argument("group", required=False)
@click.option(
    "--least",
    metavar="SIZE",
    callback=size_option,
    help="Never take the group below this. Default: half of what it uses now.",
)
@click.option(
    "--stalled",
    type=click.FloatRange(0, 100, min_open=True),
    default=0.1,
    show_default=True,
    metavar="PERCENT",
    help="Back off when somebody waits for memory for so much of the time.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.02, 3600),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two steps.",
)
@click.option("--once", is_flag=True, help="Do one step, of a 2000th of what is used, and end.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
def balloon(
    group: str | None, least: int | None, stalled: float, interval: float, once: bool, dry_run: bool
) -> None:
    """Have the control group GROUP (such as system.slice) swap out what it does not use, a little at a time.

    Run this where the programs are: in a guest that swaps to tmem, or on this machine.
    """
    if os.geteuid() != 0 and not dry_run:
        raise TmemError("reclaiming from other processes needs root: run this as root, or with --dry-run")
    from tmem.backends import interrupts
    from tmem.nbd import balloon as ballooning

    found = ballooning.find(group)
    waits = ballooning.stalls(found)
    if least is None:
        least = ballooning.look(found, 0).used_bytes // 2
    rules = ballooning.Rules(least, stalled / 100)
    limit = ballooning.limit_file(found)
    if limit is not None and not dry_run:
        before = limit.read_text(encoding="ascii").strip()
        click.echo(f"should this be killed with SIGKILL, then 'echo {before} > {limit}'", err=True)
    pace, said = ballooning.Pace(), None
    try:
        with interrupts.as_interrupt():
            while True:
                # From here on: reclaim is itself a wait, which the machine's figures count.
                waits.share(time.monotonic())
                time.sleep(interval)
                seen = ballooning.look(found, waits.share(time.monotonic()))
                pace, amount, why = ballooning.decide(pace, seen, rules)
                if amount and not dry_run:
                    ballooning.reclaim(found, amount)
                if why != said or once or dry_run:
                    said = why
                    doing = f"reclaiming {format_size(amount)}" if amount else f"nothing to do: {why}"
                    click.echo(f"{format_size(seen.used_bytes)} used, {seen.stalled:.2%} stalled, {doing}")
                if once:
                    return
    except KeyboardInterrupt:
        click.echo("ended; every limit is as it was", err=True)
