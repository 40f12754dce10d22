"""The tcgen05 kernel on the cards that it is compiled for, under several schedules."""

from dataclasses import replace

import pytest
import torch

from .test_ours import WINDOWS, assert_nothing_is_seen_behind_seqused, assert_right, case

ARCHS = ("sm_100a", "sm_103a")
STAGES = 4  # slots of the ring of K and V at head dimension 128: two blocks


@pytest.mark.parametrize(
    ("arch", "head_dim", "window"),
    [
        ("sm_100a", 64, "causal"),
        ("sm_100a", 128, "full"),
        ("sm_103a", 64, "window"),
        ("sm_103a", 128, "left"),
    ],
)
def test_masks(arch, head_dim, window):
    """A tile and a part of one, grouped heads, under 16 schedules."""
    left, right = WINDOWS[window]
    question = case(head_dim=head_dim, left=left, right=right, seqlen_q=300, seqlen_k=270)
    assert_right(question, arch, range(16))


@pytest.mark.parametrize("num_blocks", range(1, 2 * STAGES + 2))
def test_numbers_of_key_blocks(num_blocks):
    """The rings turn any number of times, from not at all on."""
    sizes = {"seqlen_q": 130, "seqlen_k": 128 * num_blocks - 1}
    assert_right(case(head_dim=128, heads=1, **sizes), "sm_100a", (num_blocks, num_blocks + 16))


def test_varlen():
    """Packed sequences of drawn lengths, the last one empty."""
    question = case(varlen=True, batch=4, seqlen_q=300, seqlen_k=400, right=0, dtype=torch.float16)
    assert_right(question, "sm_103a", (0, 6, 7))


@pytest.mark.parametrize("schedule", [0, 8, 9, 10])
def test_nan_behind_seqused(schedule):
    """Empty sequences between long ones; NaN in what does not count, in V above all."""
    question = case(batch=6, heads=1, seqlen_q=140, seqlen_k=300, head_dim=64, right=0)
    used_q, used_k = (140, 0, 33, 140, 1, 129), (101, 300, 0, 256, 1, 299)
    assert_nothing_is_seen_behind_seqused(question, used_q, used_k, "sm_100a", schedule)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (257, 64), (300, 1), (513, 513)])
def test_sizes(sizes):
    """One row, one key, more rows than keys (rows that see nothing), rows beyond a tile."""
    seqlen_q, seqlen_k = sizes
    question = case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, left=None, right=0, head_dim=64)
    assert_right(question, "sm_100a", (0, 5))


@pytest.mark.parametrize("head_dims", [(40, 40), (88, 96), (192, 128)])
def test_head_dims(head_dims):
    """What TMA fills up to the width of the tiles must not reach the result."""
    head_dim, head_dim_v = head_dims
    question = case(head_dim=head_dim, seqlen_q=300, seqlen_k=270, left=None, right=0)
    question = replace(question, head_dim_v=head_dim_v)
    assert_right(question, ARCHS[head_dim // 8 % 2], (0, 2))
