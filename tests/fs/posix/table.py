"""The table of operations: what is done to ``x`` (which may be of any kind) and its neighbours in a case.

Each operation gets the directory of the case and returns what a program would see of it. Operations that a
mount cannot offer are not here: `test_limits` has them.
"""

from . import contents, names
from .register import OPERATIONS

__all__ = ["OPERATIONS", "contents", "names"]
