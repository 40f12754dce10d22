"""Block-sparse masks in the kernels, against the oracle; blocks that divide no tile among them."""

import pytest
import torch

from tests.cases import Case
from tests.test_block_sparse import check, kinds_of
from tests.test_mods import documents

from .on_cards import ARCHS, card

SIZES = ((128, 128), (64, 32), (16, 8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mask_mod", [None, documents], ids=["lists", "mask_mod"])
def test_lists(fa4, size, mask_mod):
    turn = SIZES.index(size)
    case = Case(
        name="block_sparse", d=64, seqlens_q=(290,), seqlens_k=(410,), heads=2, heads_kv=1,
        causal=size == (64, 32),
    )  # fmt: skip
    kinds = kinds_of(case, size, per_head=mask_mod is not None)
    with card(fa4, ARCHS[turn], turn) as emulator:
        check(fa4, case, kinds, size, mask_mod, torch.device("cpu"))
    assert emulator.instructions


def test_skipped_blocks_are_not_computed(fa4):
    """One key block in eight is listed: the work must be far from that of all of them."""
    case = Case(name="skipped", d=128, seqlens_q=(40,), seqlens_k=(1024,), heads=1, heads_kv=1)
    counts = []
    for kind in (0, 2):
        kinds = torch.full((1, 1, 1, 8), kind)
        kinds[..., 3] = 2
        with card(fa4, "sm_120a") as emulator:
            check(fa4, case, kinds, (128, 128), None, torch.device("cpu"))
        counts.append(emulator.instructions)
    assert counts[0] < 0.35 * counts[1]
