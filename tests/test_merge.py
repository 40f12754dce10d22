"""Merging partial results: exact, whatever the parts are."""

import math

import pytest
import torch

from . import oracle
from .acceptance import ARITHMETIC
from .cases import BF16, F16, F32
from .oracle import Rule

SQ, SK, HEADS, D = 37, 120, 3, 16


def parts(cuts: list[int], seed: int = 0, rule: Rule | None = None):
    """[(out, lse)] in float64 over the keys between these cuts, and the result over all of them."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, HEADS, D, generator=gen) for n in (SQ, SK, SK))
    ends = [0, *cuts, SK]
    results = [
        oracle.attend(q, k[a:b], v[a:b], rule or Rule())
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]
    return [(r.out, r.lse) for r in results], oracle.attend(q, k, v, rule or Rule())


def close(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype = F32) -> None:
    """Equal but for the arithmetic of float32 and one rounding to dtype."""
    assert ours.dtype == dtype
    slip = torch.finfo(dtype).eps if dtype != F32 else 0.0
    bound = (ARITHMETIC + slip) * max(1.0, float(truth[truth.isfinite()].abs().max()))
    assert torch.equal(ours.double()[~truth.isfinite()], truth[~truth.isfinite()])
    finite = truth.isfinite()
    assert (ours.double() - truth)[finite].abs().max() <= bound


@pytest.mark.parametrize("cuts", [[60], [1], [119], [30, 31, 90], [10, 20, 30, 40, 50, 60, 70]])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_combine_of_splits_is_the_whole(fa4, device, cuts, packed):
    """(splits, b, sq, h, d_v) and (splits, total, h, d_v)."""
    pieces, whole = parts(cuts)
    out = torch.stack([o for o, _ in pieces]).float().to(device)
    lse = torch.stack([x for _, x in pieces]).float().to(device)
    if not packed:
        out, lse = out[:, None], lse[:, None]
    got, got_lse = fa4.flash_attn_combine(out, lse.mT)
    if not packed:
        got, got_lse = got[0], got_lse[0]
    close(got.cpu(), whole.out)
    close(got_lse.mT.cpu(), whole.lse)


def test_combine_takes_the_layout_of_its_name(fa4, device):
    """LSEs with heads last in and out, as in FlashAttention-4, also where heads could be rows."""
    gen = torch.Generator().manual_seed(0)
    out, lse = (torch.randn(3, 2, 8, 8, *d, generator=gen).to(device) for d in ((16,), ()))
    weights = lse.double().softmax(0)[..., None]
    truth, truth_lse = (weights * out.double()).sum(0).cpu(), lse.double().logsumexp(0).cpu()
    for _ in range(2):  # the second is the first again
        got, got_lse = fa4.flash_attn_combine(out, lse)
        close(got.cpu(), truth)
        close(got_lse.cpu(), truth_lse)
    found = fa4.flash_attn_combine(out[:, 0], lse[:, 0], return_lse=False)
    close(found[0].cpu(), truth[0])
    assert found[1] is None


@pytest.mark.parametrize("cut", [0, 1, 64, 120])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_merge_of_two_states(fa4, device, cut, dtype):
    """A part without keys, on either side, leaves the other as it is."""
    pieces, whole = parts([cut])
    (out_a, lse_a), (out_b, lse_b) = pieces
    rounded = [x.to(dtype) for x in (out_a, out_b)]
    truth, truth_lse = oracle.combine(rounded, [lse_a.T.float(), lse_b.T.float()])
    out, lse = fa4.merge_attention_states(
        rounded[0][None].to(device), lse_a[None].float().to(device),
        rounded[1][None].to(device), lse_b[None].float().to(device),
    )  # fmt: skip
    close(out[0].cpu(), truth, dtype)
    close(lse[0].cpu(), truth_lse.T)
    torch.testing.assert_close(truth_lse.T, whole.lse, rtol=1e-5, atol=1e-5)


def test_an_empty_part_may_hold_anything(fa4, device):
    """Where LSE is -inf that part's output is not read, NaN included; all empty gives 0, -inf."""
    pieces, _ = parts([60])
    out, lse = (torch.stack(x).float().to(device)[:, None] for x in zip(*pieces, strict=True))
    out[1, :, :5] = math.nan
    lse[1, :, :, :5] = -math.inf
    out[:, :, 7], lse[:, :, :, 7] = math.nan, -math.inf
    got, got_lse = fa4.flash_attn_combine(out, lse.mT)
    assert torch.equal(got[:, :5], out[0, :, :5])
    assert (got[:, 7] == 0).all() and (got_lse[:, 7] == -math.inf).all()
    assert got.isfinite().all()


def test_sizes_far_apart(fa4, device):
    """One part outweighs the other by e^200: no overflow, no NaN, the heavy part alone remains."""
    pieces, _ = parts([60])
    out, lse = (torch.stack(x).float().to(device)[:, None] for x in zip(*pieces, strict=True))
    for heavy, by in ((0, 200.0), (1, 200.0), (0, 2000.0)):
        tilted = lse.clone()
        tilted[heavy] += by
        got, got_lse = fa4.flash_attn_combine(out, tilted.mT)
        assert torch.equal(got, out[heavy])
        torch.testing.assert_close(got_lse.mT, tilted[heavy])


def test_order_of_merging_does_not_matter(fa4, device):
    """Ring attention merges in whichever order the parts arrive."""
    pieces, whole = parts([30, 70])
    states = [(o[None].float().to(device), x[None].float().to(device)) for o, x in pieces]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        out, lse = states[order[0]]
        for n in order[1:]:
            out, lse = fa4.merge_attention_states(out, lse, *states[n])
        close(out[0].cpu(), whole.out)
        close(lse[0].cpu(), whole.lse)


@pytest.mark.gpu
def test_captured_merges_replay(fa4, device):
    """One graph of both functions follows its inputs: no launch waits for the device."""
    pieces, _ = parts([60])
    outs = torch.stack([o for o, _ in pieces]).to(device, F32)
    lses = torch.stack([x for _, x in pieces]).to(device, F32)

    def call():
        two = fa4.merge_attention_states(outs[0], lses[0], outs[1], lses[1])
        return *fa4.flash_attn_combine(outs, lses.mT), *two

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for step in range(5):
        outs.normal_()
        lses.normal_(std=10.0)
        lses[step % 2, 0] = -math.inf
        graph.replay()
        for got, wanted in zip(captured, call(), strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(captured[0], captured[2]) and torch.equal(captured[1].mT, captured[3])


def test_cascade_shared_prefix_then_own_keys(fa4, device):
    """What a serving engine does: keys shared by all, then each sequence's own, merged."""
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 4, 64, generator=gen).to(BF16).to(device) for n in (9, 50, 50))
    k[1, :30], v[1, :30] = k[0, :30], v[0, :30]
    shared = fa4.flash_attn_func(q, k[:, :30], v[:, :30], return_lse=True)
    own = fa4.flash_attn_func(q, k[:, 30:], v[:, 30:], causal=True, return_lse=True)
    out, lse = fa4.merge_attention_states(*shared, *own)
    whole, whole_lse = fa4.flash_attn_func(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out, whole, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
