"""Sinks of rows that see no key: LSE = sink from every kernel, and where none is launched."""

import pytest

from tests.test_sinks import CASES

from .on_cards import ARCHS, verify


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "whole_tiles"], ids=str)
def test_mma_sync(fa4, case):
    """Prefill and decoding, split or not; cards take turns."""
    turn = CASES.index(case)
    verify(fa4, case, ARCHS[turn % 3], (turn,))


@pytest.mark.parametrize("case", [c for c in CASES if not c.decodes and any(c.seqlens_k)], ids=str)
def test_tcgen05(fa4, case):
    """Tiles that no role but the correction has work for; tiles from a counter."""
    turn = CASES.index(case)
    verify(fa4, case, ("sm_100a", "sm_103a")[turn % 2], (turn,))
