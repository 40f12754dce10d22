"""Everything between Q K^T and the softmax, and beside it: softcap, ALiBi, scales, sinks."""

import pytest

from tests.cases import BF16, F16, MASKS, Case

from .on_cards import ARCHS, verify

STEPS: dict[str, dict] = {
    "softcap": {"softcap": 20.0},
    "small_softcap": {"softcap": 0.5, "fill": "peaked"},
    "sink": {"sink": True},
    "alibi": {"alibi": "head"},
    "alibi_batch": {"alibi": "batch"},
    "zero_scale": {"softmax_scale": 0.0},
    "negative_scale": {"softmax_scale": -0.1},
    "all": {"softcap": 15.0, "sink": True, "alibi": "batch", "softmax_scale": 0.2, "d_v": 32},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(fa4, name):
    """Two sequences, rows without keys among them; cards, dtypes and masks take turns."""
    turn = list(STEPS).index(name)
    case = Case(
        name=name, d=64, seqlens_q=(40, 40), seqlens_k=(30, 30), heads=2, heads_kv=1,
        dtype=(BF16, F16)[turn % 2], **list(MASKS.values())[turn % 4], **STEPS[name],
    )  # fmt: skip
    verify(fa4, case, ARCHS[turn % 3], (0, turn))


def test_steps_of_a_wide_tile(fa4):
    """16 rows a warp, packed sequences."""
    case = Case(
        name="wide", d=256, layout="varlen", seqlens_q=(40, 7), seqlens_k=(50, 33), heads=2,
        heads_kv=2, causal=True, softcap=10.0, sink=True, alibi="head",
    )  # fmt: skip
    verify(fa4, case, "sm_90a", (0, 5))
