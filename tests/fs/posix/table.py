"""The table of operations: what is done to ``x`` (which may be of any kind) and its neighbours in a case.

Each operation gets the directory of the case and returns what a program would see of it. Operations that a
mount cannot offer are not here: `test_limits` has them.
"""

from . import contents, names
from .register import OPERATIONS, module_of

CONTENTS = frozenset(name for name, do in OPERATIONS.items() if module_of(do) == contents.__name__)
"""Those that concern what is in files."""

__all__ = ["CONTENTS", "OPERATIONS", "contents", "names"]
