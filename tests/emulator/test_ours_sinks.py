"""Sinks of rows that see no key: LSE = sink from every kernel, and where none is launched."""

import pytest

from tests.test_sinks import CASES

from .on_cards import ARCHS, verify

NAMED = {case.name: case for case in CASES}
# One epilogue serves them all: masks and layouts that a card runs and the emulator need not.
ALIKE = ("whole_tiles", "window", "used")


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ALIKE])
def test_mma_sync(fa4, name):
    """Prefill and decoding, split or not; cards take turns."""
    turn = list(NAMED).index(name)
    verify(fa4, NAMED[name], ARCHS[turn % 3], (turn,))


@pytest.mark.parametrize(
    ("name", "arch"), [("whole_tiles", "sm_100a"), ("varlen", "sm_103a"), ("split", "sm_100a")]
)
def test_tcgen05(fa4, name, arch):
    """Tiles that no role but the correction has work for; tiles from a counter."""
    verify(fa4, NAMED[name], arch, (3,))
