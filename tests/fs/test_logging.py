"""The daemon's messages to the system's log."""

import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tmem.fs.mount import Unhurried


@pytest.fixture
def syslog(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "log"))
        listening.settimeout(60)
        yield listening


def say(handler: logging.Handler, text: str) -> None:
    handler.handle(logging.LogRecord("tmem", logging.WARNING, "", 0, text, (), None))


def say_much(handler: logging.Handler) -> None:
    for number in range(2000):
        say(handler, f"{number} " + "x" * 4000)


def test_nobody_waits_for_a_log_that_does_not_read(syslog: socket.socket, tmp_path: Path) -> None:
    handler = Unhurried(str(tmp_path / "log"))
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(say_much, handler).result(60)
        finally:
            syslog.setblocking(False)
            first = syslog.recv(8192)
            syslog.close()
    assert first.startswith(b"<12>0 xxx")
    handler.close()


def test_a_log_that_is_started_anew(syslog: socket.socket, tmp_path: Path) -> None:
    handler = Unhurried(str(tmp_path / "log"))
    say(handler, "before")
    syslog.close()
    say(handler, "lost")
    (tmp_path / "log").unlink()
    say(handler, "lost, too")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anew:
        anew.bind(str(tmp_path / "log"))
        anew.settimeout(60)
        say(handler, "after \udcff")
        assert anew.recv(100) == b"<12>after \xff\0"
    handler.close()
