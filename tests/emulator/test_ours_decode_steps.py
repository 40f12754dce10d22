"""Softcap, ALiBi, sinks, scales, users' functions and left padding in the decode kernel."""

import pytest
import torch

from tests import harness
from tests.cases import BF16, F16, MASKS, Case
from tests.test_mods import MODS

from .on_cards import ARCHS, card, verify
from .test_ours_mods import call_with
from .test_ours_scores import STEPS

SIZES = {"heads": 6, "heads_kv": 2, "d": 64}


@pytest.mark.parametrize("name", STEPS)
def test_steps(fa4, name):
    """Rows of several tokens and heads, split three ways; a sink is added once."""
    turn = list(STEPS).index(name)
    case = Case(
        name=name, seqlens_q=(3,) * 2, seqlens_k=(150,) * 2, num_splits=(3, 0)[turn % 2],
        dtype=(BF16, F16)[turn % 2], **SIZES, **list(MASKS.values())[turn % 4], **STEPS[name],
    )  # fmt: skip
    verify(fa4, case, ARCHS[turn % 3], (0, turn))


@pytest.mark.parametrize("splits", [1, 2])
def test_steps_on_pages(fa4, splits):
    """What gpt-oss asks for: sinks and a window on a paged cache; sequences without keys."""
    case = Case(
        name="pages", layout="paged", page_size=16, seqlens_q=(1, 1, 2, 1), num_splits=splits,
        seqlens_k=(160,) * 4, used_k=(130, 0, 65, 1), window=(60, 0), sink=True, softcap=5.0,
        alibi="batch", **SIZES,
    )  # fmt: skip
    verify(fa4, case, "sm_120a", (0, 3))


@pytest.mark.parametrize("name", MODS)
def test_mods(fa4, name):
    """The same functions as on the CPU, without a change."""
    turn = list(MODS).index(name)
    changes = {"seqlens_q": (2, 2), "num_splits": 2, "heads": 4, "heads_kv": 1}
    call, arguments = call_with(MODS[name], ("dense", "varlen")[turn % 2], **changes)
    with card(fa4, ARCHS[turn % 3], turn) as emulator:
        answer = harness.run(fa4, call, **arguments)
    assert emulator.instructions
    harness.judge(call, answer)


@pytest.mark.parametrize("splits", [0, 2])
def test_left_padding(fa4, splits):
    """Keys before cache_leftpad are NaN, as are those behind cache_seqlens."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, n, h, 64, generator=gen).to(BF16) for n, h in ((1, 4), (200, 2), (200, 2))
    )
    start, end = (0, 70, 130), (200, 71, 190)
    for b in range(3):
        for x in (k, v):
            x[b, : start[b]] = x[b, end[b] :] = torch.nan
    pads, ends = (torch.tensor(x, dtype=torch.int32) for x in (start, end))
    options = {"cache_seqlens": ends, "cache_leftpad": pads, "causal": True, "return_lse": True}
    expected, expected_lse = fa4.flash_attn_with_kvcache(q, k, v, **options)
    with card(fa4, "sm_120a", 2) as emulator:
        out, lse = fa4.flash_attn_with_kvcache(q, k, v, num_splits=splits, **options)
    assert emulator.instructions
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
