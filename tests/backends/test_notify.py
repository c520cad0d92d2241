"""The datagram that tells systemd that a service is ready."""

import os
import socket
from pathlib import Path

import pytest

from tmem.backends import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"tmem-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}" if abstract else name)
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        notify.ready()
        assert listening.recv(100) == b"READY=1"
        assert "NOTIFY_SOCKET" not in os.environ
        notify.ready()
        with pytest.raises(BlockingIOError):
            listening.recv(100)


@pytest.mark.parametrize("address", ["", "vsock:2:1", "/nowhere/to/be/found"])
def test_an_address_that_cannot_be_reached_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready()
