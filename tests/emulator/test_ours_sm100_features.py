"""What the tcgen05 kernel shares with the others: scores, mods, dropout, cache rows, packing."""

import pytest

from tests import harness
from tests.cases import BF16, F16, Case
from tests.test_mods import MODS

from .on_cards import card, verify
from .test_ours_mods import call_with

ARCHS = ("sm_100a", "sm_103a")
LENGTHS = {"seqlens_q": (140, 140), "seqlens_k": (150, 150), "heads": 2, "heads_kv": 1}
STEPS: dict[str, dict] = {
    "softcap": {"softcap": 0.5, "fill": "peaked", "causal": True},
    "sink": {"sink": True, "window": (40, None)},
    "negative_scale": {"softmax_scale": -0.1, "window": (70, 30)},
    "dropout": {"dropout_p": 0.2},
    "all": {"softcap": 15.0, "sink": True, "alibi": "head", "d_v": 32, "layout": "varlen"},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(fa4, name):
    turn = list(STEPS).index(name)
    case = Case(name=name, d=64, dtype=(BF16, F16)[turn % 2], **{**LENGTHS, **STEPS[name]})
    verify(fa4, case, ARCHS[turn % 2], (0, turn))


@pytest.mark.parametrize("name", ["from_table", "odd_heads", "nothing"])
def test_mods(fa4, name):
    turn = list(MODS).index(name)
    call, arguments = call_with(MODS[name], ("dense", "varlen")[turn % 2])
    with card(fa4, ARCHS[turn % 2], turn) as emulator:
        answer = harness.run(fa4, call, **arguments)
    assert emulator.instructions
    harness.judge(call, answer)
