"""The rule of acceptance says yes to an honest kernel and no to every way of being wrong."""

import math
from dataclasses import replace

import pytest
import torch

from . import acceptance, oracle, philox
from .oracle import Dropout, Rule

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SQ, SK, HEADS, DIM = 40, 96, 2, 32


def inputs(dtype: torch.dtype, kind: str = "normal"):
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(s, HEADS, DIM, generator=g) for s in (SQ, SK, SK))
    if kind == "peaked":
        q = q * 20
    elif kind == "outlier":
        q[:, :, 3] *= 30
        v[:, :, 5] *= 1000
    elif kind == "constant":
        q, k, v = (torch.full_like(x, 0.3) for x in (q, k, v))
    return tuple(x.to(dtype) for x in (q, k, v))


def honest(q, k, v, rule, block=32):
    """A flash kernel: blocks of keys, float32 scores, unnormalised weights in the input dtype."""
    out = torch.zeros(*q.shape[:2], v.shape[2])
    total, peak = torch.zeros(HEADS, SQ), torch.full((HEADS, SQ), -math.inf)
    for h in range(HEADS):
        s = oracle.scores(q[:, h].float(), k[:, h].float(), rule, torch.arange(SQ), SQ, (0, h))
        for start in range(0, SK, block):
            x = s[:, start : start + block]
            new = torch.maximum(peak[h], x.amax(1))
            safe = torch.where(new.isinf(), 0.0, new)
            shrink = torch.exp(peak[h] - safe)
            p = torch.exp(x - safe[:, None])
            total[h] = total[h] * shrink + p.sum(1)
            pv = p.to(v.dtype).float() @ v[start : start + block, h].float()
            out[:, h] = out[:, h] * shrink[:, None] + pv
            peak[h] = new
    out = out / torch.where(total == 0, 1.0, total).T[..., None]
    return out.to(q.dtype), peak + torch.log(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "outlier", "constant"])
@pytest.mark.parametrize("rule", [Rule(), Rule(causal=True, softcap=3.0), Rule(window=(9, 0))])
def test_accepts_an_honest_kernel(dtype, kind, rule):
    q, k, v = inputs(dtype, kind)
    acceptance.check(*honest(q, k, v, rule), acceptance.reference(q, k, v, rule))


def flip_one_element(out, lse):
    out[7, 1, 11] += 0.05 * out.abs().max()


def swap_two_rows(out, lse):
    out[[3, 4]] = out[[4, 3]]


def swap_two_columns(out, lse):
    """What FA#2553 did: the right norm, the wrong elements."""
    out[:, :, [8, 9]] = out[:, :, [9, 8]]


def swap_heads(out, lse):
    out[:] = out.flip(1)


def scale_everything(out, lse):
    out *= 1.02


def scale_one_row(out, lse):
    out[5] *= 1.1


def zeros(out, lse):
    out.zero_()


def one_nan(out, lse):
    out[0, 0, 0] = math.nan


def one_infinity(out, lse):
    out[-1, -1, -1] = math.inf


def fill_an_empty_row(out, lse):
    out[0, 0, 0] = 1e-3


def lse_in_base_two(out, lse):
    lse *= math.log2(math.e)


def lse_off(out, lse):
    lse[0, -1] += 1e-3


def lse_nan(out, lse):
    lse[0, -1] = math.nan


def lse_zero_where_empty(out, lse):
    lse[0, 0] = 0.0


def lse_of_the_wrong_sign_where_empty(out, lse):
    lse[0, 0] = math.inf


SPOILERS = [
    flip_one_element,
    swap_two_rows,
    swap_two_columns,
    swap_heads,
    scale_everything,
    scale_one_row,
    zeros,
    one_nan,
    one_infinity,
    fill_an_empty_row,
    lse_in_base_two,
    lse_off,
    lse_nan,
    lse_zero_where_empty,
    lse_of_the_wrong_sign_where_empty,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_rejects(dtype, spoil):
    q, k, v = inputs(dtype)
    rule = Rule(causal=True, mask_mod=lambda b, h, i, j, info, aux: i > 0)  # row 0 is empty
    ref = acceptance.reference(q, k, v, rule)
    out, lse = honest(q, k, v, rule)
    acceptance.check(out, lse, ref)
    spoil(out, lse)
    with pytest.raises(AssertionError, match=" > "):
        acceptance.check(out, lse, ref)


def test_sees_an_error_that_an_outlier_hides_from_the_norms():
    """One column 1000 times larger: the max norm and L2 cannot see the other columns."""
    q, k, v = inputs(torch.bfloat16, "outlier")
    ref = acceptance.reference(q, k, v, Rule())
    out, _ = honest(q, k, v, Rule())
    out[:, :, 6] *= 1.05
    verdict = {finding.name: finding.ok for finding in acceptance.findings(out, ref)}
    assert verdict == {"field": True, "l2": True, "row": True, "element": False}


def test_rejects_another_shape_or_dtype():
    q, k, v = inputs(torch.float16)
    ref = acceptance.reference(q, k, v, Rule())
    out, lse = honest(q, k, v, Rule())
    for wrong in ((out.float(), lse), (out[:-1], lse), (out, lse.T), (out, lse.double())):
        with pytest.raises(AssertionError, match="expected"):
            acceptance.check(*wrong, ref)


def test_softcap_widens_the_field_bound_only():
    q, k, v = inputs(torch.bfloat16)
    with_cap = acceptance.reference(q, k, v, Rule(softcap=5.0))
    without = replace(with_cap, softcap=0.0)
    out, _ = honest(q, k, v, Rule(softcap=5.0))
    wide, narrow = acceptance.findings(out, with_cap), acceptance.findings(out, without)
    assert wide[0].bound > narrow[0].bound
    assert [f.bound for f in wide[1:]] == [f.bound for f in narrow[1:]]


def test_gradients_by_the_same_rule():
    exact = torch.randn(20, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    naive = (exact * (1 + 1e-3)).bfloat16()
    acceptance.check_gradient(exact.bfloat16(), exact, naive, naive, "grad")
    for wrong in (
        exact.bfloat16() * 1.05,
        torch.full_like(naive, math.nan),
        exact.flip(1).bfloat16(),
    ):
        with pytest.raises(AssertionError, match=" > "):
            acceptance.check_gradient(wrong, exact, naive, naive, "grad")


@pytest.mark.parametrize(("sink", "right"), [(95.0, True), (60.0, False)])
def test_weights_that_float32_cannot_hold_may_be_zero(sink, right):
    """A sink so far above the scores leaves 2^-137 of the values; 2^-87 of them is not nothing."""
    q, k, v = (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), torch.ones(1, 1, 8))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    ref = acceptance.reference(q, k, v, Rule(sink=torch.tensor([sink])))
    lse = torch.full((1, 1), sink)
    if right:
        acceptance.check(torch.zeros_like(q), lse, ref)
        return
    with pytest.raises(AssertionError, match="l2"):
        acceptance.check(torch.zeros_like(q), lse, ref)


@pytest.mark.parametrize(("quanta", "right"), [(4, True), (3, False), (0, False)])
def test_weights_may_be_rounded_before_dropout_divides_them(quanta, right):
    """The heavy one of two keys is dropped, the other weighs 2.42 of float16's smallest steps."""
    q, k, v = (torch.zeros(n, 1, 8, dtype=torch.float16) for n in (1, 2, 2))
    q[..., 0], k[1, :, 0], v[:] = 1, -15.75, 1
    rule = Rule(
        softmax_scale=1.0,
        dropout=next(
            Dropout(0.5, seed, 0)
            for seed in range(99)
            if philox.multipliers(0.5, (seed, 0), 0, torch.arange(1), 2).tolist() == [[0.0, 2.0]]
        ),
    )
    out = torch.full_like(q, quanta * 2.0**-24)
    lse = torch.zeros(1, 1)
    if right:
        acceptance.check(out, lse, acceptance.reference(q, k, v, rule))
    else:
        with pytest.raises(AssertionError, match="row .* > "):
            acceptance.check(out, lse, acceptance.reference(q, k, v, rule))
