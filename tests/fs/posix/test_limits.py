"""What a mount cannot offer fails, or differs, exactly as the documentation says."""

import errno
import os
from pathlib import Path

import pytest

from .compare import Twins, errno_name
from .limits import LIMITS, LIMITS_BETWEEN, stage


@pytest.mark.parametrize("name", LIMITS)
def test_operation(name: str, twins: Twins) -> None:
    do, lower, mount, others = LIMITS[name]
    case = twins.stage(stage)
    found = []
    for root in (twins.plain, twins.point):
        try:
            found.append(do(root / case))
        except OSError as error:
            found.append(errno_name(error))
    assert found == [lower, mount if twins.native else others]


def test_files_that_are_passed_through_have_fewer(passing: Twins) -> None:
    do, *_ = LIMITS["unaligned_direct_read"]
    case = passing.stage(stage)
    for root in (passing.plain, passing.point):
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            do(root / case)


@pytest.mark.parametrize("name", LIMITS_BETWEEN)
def test_two_programs(name: str, twins: Twins) -> None:
    do, lower, mount = LIMITS_BETWEEN[name]
    case = twins.stage(stage)

    def meet(here: Path, below: Path) -> object:
        try:
            return do(here / case, below / case)
        except OSError as error:
            return errno_name(error)

    assert [meet(twins.plain, twins.plain), meet(twins.point, twins.lower)] == [lower, mount]
