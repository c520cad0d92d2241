"""Lines of kernel files in which there are names of anybody: mount points, swap files, programs.

Such a name is bytes, neither UTF-8 nor free of what Python takes for the end of a line or a space. One odd
mount point anywhere on the machine must not keep us from starting. Plain functions, any thread.
"""

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")


_ESCAPE = re.compile(r"\\([0-7]{3})")


def text(path: Path) -> str:
    """Return the file, decoded as paths are. OSError if it cannot be read."""
    return os.fsdecode(path.read_bytes())


def lines(path: Path) -> list[str]:
    """Return the lines of the file, as `text` has them. OSError if it cannot be read."""
    return lines_of(text(path))


def lines_of(text: str) -> list[str]:
    """Return the lines of `text`, as the kernel ends them."""
    return text.removesuffix("\n").split("\n") if text else []


def unescape(field: str) -> str:
    """Return a field of mountinfo without its octal escapes."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)
