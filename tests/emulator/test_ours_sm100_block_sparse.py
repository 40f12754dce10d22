"""Block-sparse masks in the tcgen05 kernel, against the oracle: what `matrix` does not ask."""

import torch

from tests.cases import Case
from tests.test_block_sparse import check, kinds_of

from .on_cards import card


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
