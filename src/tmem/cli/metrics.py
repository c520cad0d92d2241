"""The command ``metrics``: the statistics in the form of Prometheus, on an address or on standard output.

``tmem start --metrics`` has the manager run it; ``--once`` is for a file of node_exporter's textfile
collector. Not for what is exported (`tmem.backends.exposition`).
"""

import click

from tmem.backends.paths import SegmentPaths
from tmem.cli.context import address_or_off, segment_name


@click.command()
@click.argument("address", required=False, metavar="[HOST:PORT]", callback=address_or_off)
@click.option("--once", is_flag=True, help="Print what a scrape would get, and end.")
@click.pass_context
def metrics(ctx: click.Context, address: str | None, once: bool) -> None:
    """Serve the statistics of the segment for Prometheus on HOST:PORT, in the foreground.

    'tmem start --metrics HOST:PORT' has the manager do so, and start it again when it ends. Whoever can
    connect there can read names and statistics of all clients: choose a loopback address, or a network of
    your own.
    """
    if once == (address is not None):
        raise click.UsageError("give HOST:PORT, or --once")
    from tmem.backends import exporter  # it brings prometheus_client
    from tmem.cli.mountmetrics import MountCollector
    from tmem.types import parse_host_port

    paths = SegmentPaths.of(segment_name(ctx))
    if address is None:
        click.echo(exporter.text(paths, MountCollector(paths)), nl=False)
    else:
        exporter.serve(paths, *parse_host_port(address), MountCollector(paths))
