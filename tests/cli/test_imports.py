"""What the command line does not import: that is what makes it quick, whatever else the machine does."""

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tmem.backends import _native

HEAVY = {
    *("asyncio", "concurrent.futures", "email", "multiprocessing", "prometheus_client", "pyfuse3"),
    *("redis", "rich", "ssl", "trio", "unittest", "http", "tmem.fs", "tmem.nbd", "tmem.bench"),
    # Smaller ones, which together were a quarter of the time.
    *("ctypes", "logging", "pickle", "subprocess", "tempfile", "tomllib", "urllib.request"),
    *("tmem.backends.tiers.spill", "tmem.backends.tiers.orphans", "tmem.backends.tiers.redis_url"),
}
WATCHED = """
import sys
from tmem.cli.main import run
status = run({arguments!r})
print(*sys.modules, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list"], ["list", "--json"], ["freeable"], ["set", "web1", "--weight", "9"]],
)
def test_nothing_heavy(segment: "_native.Segment", arguments: list[str]) -> None:
    segment.client("web1")
    code = WATCHED.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert "tmem.cli.main" in imported
    assert not HEAVY & imported
