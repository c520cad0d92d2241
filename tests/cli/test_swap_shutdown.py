"""``swap remove`` insists while systemd shuts the machine down: what has no room then is about to end, too.

In a mount namespace of its own, where /run is an empty tmpfs and ``systemctl`` a script.
"""

import subprocess
import sys
from pathlib import Path

import pytest

REMOVE = """
from tmem.cli.main import main
from tmem.nbd import lifecycle
lifecycle.remove = lambda paths, client, progress, force: print("force", force)
main()
"""


def force(directory: Path, systemd: bool, state: str, *options: str) -> str:
    """Run ``swap remove`` on a machine in this state; what the device's end is asked for."""
    systemctl = directory / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho {state}\n[ {state} = running ]\n")
    systemctl.chmod(0o755)
    script = f"""
        mount -t tmpfs tmpfs /run
        {"mkdir -p /run/systemd/system" if systemd else ""}
        PATH="{directory}:$PATH" exec "$@"
    """
    result = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-ec", script, "sh"),
            *(sys.executable, "-c", REMOVE, "swap", "remove", "guest1", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def namespaces(root: None) -> None:
    """Skip where there can be no mount namespace."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot make a mount namespace")


@pytest.mark.usefixtures("namespaces")
def test_force_is_implied_at_shutdown_only(tmp_path: Path) -> None:
    assert force(tmp_path, True, "stopping") == "force True"
    for state in ("running", "degraded", "starting"):
        assert force(tmp_path, True, state) == "force False"
    # systemctl may be installed without systemd running.
    assert force(tmp_path, False, "stopping") == "force False"
    assert force(tmp_path, False, "running", "--force") == "force True"
