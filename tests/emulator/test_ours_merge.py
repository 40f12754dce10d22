"""flash_attn_combine and merge_attention_states by the kernel, on every card."""

import math

import pytest
import torch

from tests import harness
from tests.cases import BF16, F16, F32, Case
from tests.fuzz.verdict import check_rest
from tests.test_merge import close, parts

from .on_cards import ARCHS, card


def stacked(num_parts: int, shape: tuple, dtype: torch.dtype):
    """Partial results (parts, b, s, h, d) and LSEs far apart, some parts without keys, with NaN."""
    gen = torch.Generator().manual_seed(num_parts)
    out = torch.randn(num_parts, *shape, generator=gen).to(dtype)
    b, s, h, _ = shape
    lse = torch.randn(num_parts, b, h, s, generator=gen) * 20
    empty = torch.rand(lse.shape, generator=gen) < 0.4
    empty[:, 0, 0, 0] = True
    lse[empty] = -math.inf
    lse[empty & (torch.rand(lse.shape, generator=gen) < 0.5)] = math.inf
    out[empty.transpose(-1, -2)] = math.nan
    return out, lse


def expected(out: torch.Tensor, lse: torch.Tensor):
    """In float64, by the formula."""
    lse = lse.double().masked_fill(lse == math.inf, -math.inf).transpose(-1, -2)
    total = lse.logsumexp(0)
    weights = (lse - total.masked_fill(total == -math.inf, 0.0)).exp()[..., None]
    merged = (out.double().masked_fill(weights == 0, 0.0) * weights).sum(0)
    return merged, total.transpose(-1, -2)


COMBINES = {
    "fp32": (7, (2, 5, 2, 64), F32, None),
    "bf16_to_fp32": (3, (1, 4, 3, 128), BF16, F32),
    "fp32_to_fp16": (256, (1, 2, 2, 32), F32, F16),
    "columns_of_no_vector": (5, (1, 3, 2, 13), F16, None),
    "more_than_a_launch_takes": (300, (1, 2, 1, 16), F32, None),
    "wide": (4, (1, 3, 2, 264), BF16, None),
}


@pytest.mark.parametrize("name", COMBINES)
def test_combine(fa4, name):
    num_parts, shape, dtype, out_dtype = COMBINES[name]
    out, lse = stacked(num_parts, shape, dtype)
    turn = list(COMBINES).index(name)
    given = lse.mT.contiguous() if turn % 2 else lse.mT  # LSEs of any strides
    with card(fa4, ARCHS[turn % 3], turn) as emulator:
        got, got_lse = fa4.flash_attn_combine(out, given, out_dtype=out_dtype)
    assert len(emulator.runs) == (3 if num_parts > 256 else 1), "one launch, no more"
    truth, truth_lse = expected(out, lse)
    close(got, truth, out_dtype or dtype)
    close(got_lse.mT, truth_lse)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strides", ["same", "others", "unaligned"])
def test_merge_of_two_states(fa4, dtype, strides):
    """The two tensors lie anywhere, in any order; a part without keys is not read."""
    out, lse = stacked(2, (2, 3, 2, 24), dtype)
    outs = [x.clone() for x in out]
    if strides == "others":
        outs[1] = outs[1].transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "unaligned":
        outs = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in outs]
    with card(fa4, "sm_121a", 2) as emulator:
        got, got_lse = fa4.merge_attention_states(outs[1], lse[1], outs[0], lse[0])
    assert len(emulator.runs) == 1
    truth, truth_lse = expected(out, lse)
    close(got, truth, dtype)
    close(got_lse, truth_lse)


def test_packed_parts(fa4):
    pieces, whole = parts([30, 31, 90])
    out = torch.stack([o for o, _ in pieces]).float()
    lse = torch.stack([x for _, x in pieces]).float()
    given = torch.full(whole.out.shape, math.nan)
    with card(fa4, "sm_120a", 3):
        got, got_lse = fa4.flash_attn_combine(out, lse.mT, out=given)
    assert got.data_ptr() == given.data_ptr()
    close(got, whole.out)
    close(got_lse.mT, whole.lse)


@pytest.mark.parametrize("used", [None, (1, 0, 3, -1)], ids=["all", "used"])
def test_a_cta_a_row_of_packed_queries(fa4, used):
    """Not one for each that sequences could have: no bound is given, so all rows of each.

    Empty sequences, and rows behind the last one.
    """
    case = Case(
        name="packed", layout="varlen", d=64, heads=2, heads_kv=1, seqlens_q=(3, 0, 4, 1),
        seqlens_k=(90, 5, 0, 70), used_q=used, num_splits=2, sink=True, causal=True,
    )  # fmt: skip
    call = harness.build(case, torch.device("cpu"))
    del call.tensors["max_seqlen_q"]
    call.q = torch.cat([call.q, torch.full_like(call.q[:2], math.nan)])
    grids = []
    with card(fa4, "sm_120a", 1) as emulator:
        launch = emulator.host.on_launch
        emulator.host.on_launch = lambda given: (grids.append(given.grid), launch(given))
        out, lse = harness.run_uncut(fa4, call)
    assert len(grids) == 2 and tuple(grids[1]) == (len(call.q) * case.heads, 1, 1)
    harness.judge(call, harness.cut(call, out, lse))
    check_rest(call, out, lse)


def test_gradients_take_pytorch_operations(fa4):
    """Where autograd records, the result is differentiable and no kernel runs."""
    out, lse = (x.requires_grad_() for x in stacked(2, (1, 3, 2, 8), F32))
    with card(fa4, "sm_120a") as emulator:
        got, _ = fa4.flash_attn_combine(out.nan_to_num(), lse.mT)
    assert got.requires_grad and not emulator.runs


def test_too_many_columns(fa4):
    out, lse = stacked(2, (1, 1, 1, 520), F32)
    with (
        card(fa4, "sm_120a"),
        pytest.raises(NotImplementedError, match=r"out_partial.shape\[-1\]=520.*512"),
    ):
        fa4.flash_attn_combine(out, lse.mT)
