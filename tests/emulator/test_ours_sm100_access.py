"""How the tcgen05 kernel reaches its operands: heads that share tiles, pages, split keys."""

import pytest

from tests.cases import BF16, F16, Case

from .on_cards import verify

ARCHS = ("sm_100a", "sm_103a")
TWO = {"seqlens_q": (140, 140), "seqlens_k": (150, 150)}
UNEVEN = {"layout": "varlen", "seqlens_q": (60, 0, 280), "seqlens_k": (130, 5, 70)}
# The merge of split keys takes the emulator longer than all else: few rows there.
FEW = {"layout": "varlen", "seqlens_q": (70, 0, 9), "seqlens_k": (290, 20, 129), "causal": True}
PAGES = FEW | {"layout": "paged"}

PACKED: dict[str, dict] = {
    "whole_tile": {"heads": 8, "heads_kv": 2, "causal": True, **TWO},
    "idle_rows": {"heads": 3, "heads_kv": 1, "pack_gqa": True, "window": (40, 10), **TWO},
    "head_by_head": {"heads": 7, "heads_kv": 1, "sink": True, "alibi": "batch", **UNEVEN},
    "dropout": {"heads": 4, "heads_kv": 2, "dropout_p": 0.2, "causal": True, **UNEVEN},
}
# name: a page of each kind, in pieces that TMA brings or that cp.async gathers
PAGED: dict[str, dict] = {
    "page_of_16": {"page_size": 16, "heads": 4, "heads_kv": 2},
    "page_of_2_blocks": {"page_size": 256, "strides": "interleaved_kv", "d": 128},
    "page_of_a_block_and_a_half": {"page_size": 192, "d": 128, "d_v": 96, "num_splits": 2},
    "page_of_1": {"page_size": 1, "strides": "interleaved_kv", "sink": True},
    "page_of_3": {"page_size": 3, "heads": 4, "heads_kv": 1, "d": 128},
    "page_of_100": {"page_size": 100, "num_splits": 3, "dropout_p": 0.1, "d": 72},
}
SPLIT: dict[str, dict] = {
    "dense": {"num_splits": 3, "seqlens_q": (80,), "seqlens_k": (500,), "sink": True},
    "more_than_blocks": {"num_splits": 7, "d": 96, **FEW},
}


def check(fa4, name: str, table: dict[str, dict]) -> None:
    turn = list(table).index(name)
    options = {"d": 64, "heads": 2, "heads_kv": 1, "dtype": (BF16, F16)[turn % 2], **table[name]}
    verify(fa4, Case(name=name, **options), ARCHS[turn % 2], (0, turn + 1))


@pytest.mark.parametrize("name", PACKED)
def test_packed_heads(fa4, name):
    check(fa4, name, PACKED)


@pytest.mark.parametrize("name", PAGED)
def test_pages(fa4, name):
    """Shuffled, NaN in what does not count, entries past the end that must not be followed."""
    check(fa4, name, {key: PAGES | value for key, value in PAGED.items()})


@pytest.mark.parametrize("name", SPLIT)
def test_split_keys(fa4, name):
    check(fa4, name, SPLIT)
