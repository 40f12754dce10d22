"""Block-sparse masks in the tcgen05 kernel, against the oracle."""

import pytest
import torch

from tests.cases import Case
from tests.test_block_sparse import check, kinds_of
from tests.test_mods import documents

from .on_cards import card

# Block size, mask_mod, and what else is asked: bands, pairs of CTAs.
ASKED = {
    "blocks_of_a_tile": ((128, 128), None, {}),
    "small_blocks": ((64, 32), documents, {"causal": True}),
    "odd_blocks": ((48, 200), documents, {"window": (90, 40), "d": 128}),
    "pair": ((16, 8), None, {"d": 256, "causal": True}),
}


@pytest.mark.parametrize("name", ASKED)
def test_lists(fa4, name):
    size, mask_mod, options = ASKED[name]
    turn = list(ASKED).index(name)
    shape = {"seqlens_q": (290,), "seqlens_k": (410,), "heads": 2, "heads_kv": 1, "d": 64}
    case = Case(name=name, **{**shape, **options})
    kinds = kinds_of(case, size, per_head=mask_mod is not None)
    with card(fa4, ("sm_100a", "sm_103a")[turn % 2], turn) as emulator:
        check(fa4, case, kinds, size, mask_mod, torch.device("cpu"))
    assert emulator.instructions


def test_split_lists(fa4):
    """A split takes its share of a list; the first block of queries has no keys at all."""
    case = Case(name="split", d=64, seqlens_q=(70,), seqlens_k=(700,), heads=1, heads_kv=1)
    kinds = kinds_of(case, (64, 32), per_head=False)
    with card(fa4, "sm_103a", 1):
        check(fa4, case, kinds, (64, 32), None, torch.device("cpu"), num_splits=3)


def test_skipped_blocks_are_not_computed(fa4):
    """Two key blocks in eight are listed: the work must be far from that of all of them."""
    case = Case(name="skipped", d=64, seqlens_q=(40,), seqlens_k=(1024,), heads=1, heads_kv=1)
    counts = []
    for kind in (0, 2):
        kinds = torch.full((1, 1, 1, 8), kind)
        kinds[..., 1::4] = 2
        with card(fa4, "sm_100a") as emulator:
            check(fa4, case, kinds, (128, 128), None, torch.device("cpu"))
        counts.append(emulator.instructions)
    assert counts[0] < 0.5 * counts[1]
