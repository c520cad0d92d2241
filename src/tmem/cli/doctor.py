"""The command ``doctor``: prints what `tmem.doctor` finds, with the command that mends it.

Not for looking itself. Exit status 1 if something that is needed is missing.
"""

import json
from dataclasses import asdict

import click

from tmem import doctor as findings
from tmem.backends.paths import SegmentPaths
from tmem.cli.context import segment_name

_COLOURS = {findings.OK: "green", findings.NOTE: "yellow", findings.MISSING: "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check the machine, the segment and the manager, and say how to mend what is missing."""
    found = findings.examine(SegmentPaths.of(segment_name(ctx)), ctx.obj["config"])
    missing = sum(finding.state == findings.MISSING for finding in found)
    if as_json:
        click.echo(json.dumps({"missing": missing, "findings": [asdict(one) for one in found]}, indent=2))
    else:
        width = max(len(one.name) for one in found)
        group = ""
        for one in found:
            if one.group != group:
                group = one.group
                click.secho(group, bold=True)
            state = click.style(f"{one.state:<7}", fg=_COLOURS[one.state])
            click.echo(f"  {state}  {one.name:<{width}}  {one.detail}")
            if one.remedy and one.state != findings.OK:
                click.echo(f"  {'':<7}  {'':<{width}}  -> {one.remedy}")
        click.echo(f"{missing} needed things are missing" if missing else "nothing that is needed is missing")
    if missing:
        ctx.exit(1)
