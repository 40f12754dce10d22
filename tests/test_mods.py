"""score_mod and mask_mod: a user's function on every score, a user's mask."""

import pytest
import torch

from . import acceptance, harness, oracle
from .cases import BF16, F32, Case
from .oracle import Rule


def relative_bias(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score - 0.1 * abs(q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q - kv_idx)


def by_head_and_batch(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score * (1 + 0.1 * h) + 0.05 * b


def from_table(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + aux_tensors[0][h, kv_idx]


def documents(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (q_idx // 32) == (kv_idx // 32)


def prefix_lm(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (kv_idx < 20) | (kv_idx <= q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q)


def odd_heads_see_less(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (h % 2 == 0) | (kv_idx % 3 == 0)


def nothing(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (kv_idx < 0) & (q_idx < 0)


MODS = {
    "relative_bias": Rule(score_mod=relative_bias),
    "by_head_and_batch": Rule(score_mod=by_head_and_batch, softmax_scale=0.4),
    "from_table": Rule(score_mod=from_table, causal=True),
    "softcap_then_mod": Rule(score_mod=relative_bias, softcap=4.0),
    "documents": Rule(mask_mod=documents),
    "documents_causal": Rule(mask_mod=documents, causal=True),
    "prefix_lm": Rule(mask_mod=prefix_lm),
    "odd_heads": Rule(mask_mod=odd_heads_see_less, window=(50, 10)),
    "nothing": Rule(mask_mod=nothing),
    "both": Rule(score_mod=by_head_and_batch, mask_mod=documents),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["dense", "varlen", "paged"])
@pytest.mark.parametrize("name", MODS)
def test_mods(fa4, device, name, layout, dtype):
    """Positions count within the sequence, whatever the layout."""
    if device.type == "cuda" and (dtype is F32 or layout == "paged"):
        pytest.skip("the GPU kernels refuse float32, and mods over pages")
    rule = MODS[name]
    case = Case(
        name=f"mod_{name}", layout=layout, dtype=dtype, d=32, seqlens_q=(70, 70),
        seqlens_k=(90, 90), page_size=16 if layout == "paged" else None,
    )  # fmt: skip
    call = harness.build(case, device)
    table = [torch.randn(4, 90, device=device)] if rule.score_mod is from_table else None
    call.rule = Rule(**{**vars(rule), "aux_tensors": table})
    options = {
        "score_mod": rule.score_mod,
        "mask_mod": rule.mask_mod,
        "aux_tensors": table,
        "causal": rule.causal,
        "window_size": rule.window,
        "softcap": rule.softcap,
        "softmax_scale": rule.softmax_scale,
    }
    harness.judge(call, harness.run(fa4, call, **options))


def test_mask_mod_is_differentiable(fa4):
    """Through out, against autograd of the formulas."""
    q, k, v = (torch.randn(1, 40, 2, 16).requires_grad_() for _ in range(3))
    out = fa4.flash_attn_func(q, k, v, mask_mod=documents)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    truth = oracle.attend(*(x[0].double() for x in (q, k, v)), Rule(mask_mod=documents)).out
    for ours, exact in zip(
        grads, torch.autograd.grad(truth.square().sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_fa2298_two_closures_of_one_function(fa4, device):
    """FA#2298: a cache keyed by the function's source gave the first closure's answer again."""
    q, k, v = (torch.randn(1, 30, 2, 16, device=device).bfloat16() for _ in range(3))

    def shifted(by: int):
        return lambda b, h, i, j, info, aux: j <= i + by

    for by in (0, 3, 7):
        out = fa4.flash_attn_func(q, k, v, mask_mod=shifted(by))
        ref = acceptance.reference(q[0], k[0], v[0], Rule(window=(None, by)))
        acceptance.check(out[0], None, ref, f"shifted by {by}")
