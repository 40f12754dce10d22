"""Many queries on pages and split keys: every step of the scores, dropout and block lists."""

from dataclasses import replace

import pytest
import torch

from tests.cases import CHUNKS, Case
from tests.test_block_sparse import check, kinds_of

from .on_cards import ARCHS, card, verify

BY_NAME = {case.name: case for case in CHUNKS}


@pytest.mark.parametrize(
    "name",
    ["splits_steps", "splits_dropout", "pages_steps", "pages_dropout", "pages_dropout_decode"],
)
def test_steps(fa4, name):
    """A sink is added once; the same seed drops the same elements, whatever the parts."""
    turn = list(BY_NAME).index(name)
    verify(fa4, BY_NAME[name], ARCHS[turn % 3], (turn % 8,))


def test_more_splits_than_blocks(fa4):
    """Most parts of a tile have no keys; the emulated card has 3 SMs, so 0 chooses splits too."""
    for splits in (0, 256):
        case = replace(
            BY_NAME["dense_causal_splits256"], num_splits=splits, heads=1, heads_kv=1,
            seqlens_q=(135,), seqlens_k=(200,), d=64,
        )  # fmt: skip
        verify(fa4, case, "sm_121a", (5,))


def test_split_block_lists(fa4):
    """Each part follows its share of the list."""
    case = Case(
        name="lists", d=64, seqlens_q=(140,), seqlens_k=(410,), heads=1, heads_kv=1, num_splits=3,
    )  # fmt: skip
    with card(fa4, "sm_120a", 6) as emulator:
        kinds, cpu = kinds_of(case, (64, 32), True), torch.device("cpu")
        check(fa4, case, kinds, (64, 32), None, cpu, num_splits=case.num_splits)
    assert len(emulator.runs) == 2, "the forward kernel and its merge"
