"""The core of the tcgen05 kernel's acceptance matrix, under one schedule each; see `matrix`."""

import pytest

from . import matrix

CORE = matrix.core()


@pytest.mark.parametrize("name", CORE)
def test_core(fa4, name):
    """Cards and schedules take turns."""
    turn = list(CORE).index(name)
    CORE[name](fa4, ("sm_100a", "sm_103a")[turn % 2], turn % matrix.CORE_SCHEDULES)


def test_enough():
    """At least 24 entries in the core and 200 in the wide set."""
    assert len(CORE) >= 24 and len(matrix.wide()) >= 200
