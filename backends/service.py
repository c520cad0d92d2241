"""The client's side of the manager's control socket: one request, one answer.

One JSON object a line each way over a Unix stream socket in the segment's state directory. Operations:
``ping``, ``supervise`` (name, argv, env, client), ``unsupervise`` (name, timeout_s), ``services``, ``stop``.
Not for pages: they never pass through the manager. Threading: blocking, callable from any thread, not from a
trio task.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmem.backends.paths import SegmentPaths
from tmem.errors import ServiceError

ANSWER_TIMEOUT_S = 10.0
MAX_LINE_BYTES = 1 << 20
"""The longest request or answer."""

_MAX_SUN_PATH = 107


def request(
    paths: SegmentPaths, message: dict[str, object], timeout_s: float | None = None
) -> dict[str, object]:
    """Send `message` to the manager of the segment and return its answer.

    Waits `timeout_s`, by default ten seconds beyond the message's own ``timeout_s``. Raises `ServiceError`
    when no manager listens, when it does not answer in time, and when it answers with an error.
    """
    if timeout_s is None:
        own = message.get("timeout_s", 0)
        timeout_s = ANSWER_TIMEOUT_S + (own if isinstance(own, int | float) else 0)
    try:
        with socket.socket(socket.AF_UNIX) as connection, socket_address(paths.control) as address:
            connection.settimeout(timeout_s)
            connection.connect(address)
            connection.sendall(json.dumps(message).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline(MAX_LINE_BYTES)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ServiceError(
            f"no manager runs for segment {paths.name!r}: start it with 'tmem --name {paths.name} start -d'"
        ) from None
    except TimeoutError:
        raise ServiceError(
            f"the manager of segment {paths.name!r} did not answer within {timeout_s:.0f} s: "
            f"look at it with 'tmem --name {paths.name} doctor'"
        ) from None
    except (ConnectionResetError, BrokenPipeError):
        line = b""
    except OSError as error:
        raise ServiceError(
            f"cannot reach the manager of segment {paths.name!r} ({error.strerror or error}): run this as "
            "the segment's user or as root"
        ) from error
    return _checked(line, paths.name)


def ping(paths: SegmentPaths, timeout_s: float | None = None) -> tuple[int, dict[str, object]]:
    """Return the manager's process id, and all that it answers. `ServiceError` as in `request`."""
    answer = request(paths, {"op": "ping"}, timeout_s)
    if not isinstance(pid := answer.get("pid"), int):
        raise _not_understood(paths.name)
    return pid, answer


def _not_understood(name: str) -> ServiceError:
    return ServiceError(
        f"the manager of segment {name!r} sent no answer that this version understands: end it, and start it "
        f"again with 'tmem --name {name} start -d'"
    )


def _checked(line: bytes, name: str) -> dict[str, object]:
    if not line.endswith(b"\n"):
        raise ServiceError(
            f"the manager of segment {name!r} ended before it answered: start it again with "
            f"'tmem --name {name} start -d'"
        )
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise _not_understood(name)
    if "error" in answer:
        raise ServiceError(str(answer["error"]))
    return answer


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Yield an address for `path` that fits a socket address (107 bytes), however deep `path` lies."""
    if len(os.fsencode(path)) <= _MAX_SUN_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
