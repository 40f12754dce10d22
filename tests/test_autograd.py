"""Gradients of q, k, v and sinks, through out and LSE, against autograd of the float64 formulas."""

import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from . import acceptance, cases, harness, oracle
from .cases import BF16, F16, F32, Case
from .oracle import EXACT, MIXED, NAIVE, Precision

GRADIENT_CASES = [
    Case(name=f"{str(dtype)[6:]}_{mask}", dtype=dtype, d=64, seqlens_q=(75, 75), **args)
    for dtype in (F32, F16, BF16)
    for mask, args in cases.MASKS.items()
]
GRADIENT_CASES = [replace(c, seqlens_k=(130, 130)) for c in GRADIENT_CASES] + [
    Case(name="empty_rows", dtype=F32, d=64, causal=True, seqlens_q=(70,), seqlens_k=(40,)),
    Case(name="gqa3", dtype=F32, d=40, heads=6, heads_kv=2, causal=True),
    Case(name="mqa", dtype=BF16, d=32, heads=5, heads_kv=1),
    Case(name="d_v", dtype=F32, d=48, d_v=24, causal=True),
    Case(name="softcap", dtype=F32, d=32, softcap=3.0, causal=True),
    Case(name="sink", dtype=F32, d=32, sink=True, window=(30, 0)),
    Case(name="sink_empty_rows", dtype=F32, d=32, sink=True, causal=True, seqlens_k=(50,)),
    Case(name="alibi", dtype=F32, d=32, alibi="batch", causal=True),
    Case(name="scale", dtype=F32, d=32, softmax_scale=-0.3),
    Case(
        name="all", dtype=F32, d=32, d_v=16, softcap=5.0, sink=True, alibi="head", window=(40, 10)
    ),
    Case(name="peaked", dtype=F32, d=32, fill="peaked"),
    Case(name="transposed", dtype=F32, d=32, strides="transposed", causal=True),
    Case(name="one_token", dtype=F32, d=32, seqlens_q=(1,), seqlens_k=(1,)),
    Case(name="no_keys", dtype=F32, d=32, seqlens_k=(0,)),
    Case(name="no_queries", dtype=F32, d=32, seqlens_q=(0,)),
    Case(name="splits", dtype=F32, d=32, num_splits=3, causal=True),
] + [
    Case(
        name=f"varlen_{name}", layout="varlen", dtype=F32, d=32, causal=True,
        seqlens_q=cases.VARLEN_LENGTHS[name][0], seqlens_k=cases.VARLEN_LENGTHS[name][1],
    )
    for name in ("interleaved_zeros", "more_queries_than_keys", "many_short")
] + [
    Case(
        name=f"used_{layout}", layout=layout, dtype=F32, d=32, causal=True, seqlens_q=(60,) * 3,
        seqlens_k=(80,) * 3, used_q=(60, 0, 7), used_k=(3, 80, 50),
    )
    for layout in ("dense", "varlen")
] + [
    Case(
        name="paged", layout="paged", page_size=16, dtype=F32, d=32, causal=True,
        seqlens_q=(9, 0, 20), seqlens_k=(40,) * 3, used_k=(17, 5, 40),
    ),
]  # fmt: skip


def weights_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A fixed random cotangent."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=gen).to(x)


def loss(out: torch.Tensor, lse: torch.Tensor, d_out: torch.Tensor, d_lse: torch.Tensor):
    """A scalar through both results; rows without keys have no LSE to speak of."""
    finite = torch.where(lse.isfinite(), lse, 0.0)
    return (out * d_out).sum() + (finite * d_lse).sum()


def kernel_gradients(fa4, call: harness.Call):
    """(cotangents per sequence, gradients of q, k, v in the call's layout, of the sink)."""
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    call.q, call.k, call.v = leaves
    if call.rule.sink is not None:
        sink = call.rule.sink.detach().requires_grad_()
        call.rule = replace(call.rule, sink=sink)
        leaves.append(sink)
    out, lse = harness.run_uncut(fa4, call)
    d_out, d_lse = weights_like(out, 1), weights_like(lse, 2)
    grads = torch.autograd.grad(loss(out, lse, d_out, d_lse), leaves)
    return harness.cut(call, d_out, d_lse), grads[:3], grads[3] if len(grads) == 4 else None


def formula_gradients(call: harness.Call, cotangents: harness.Answer, precision: Precision):
    """The same by autograd of the formulas: ([dq], [dk], [dv]) by sequence, dsink."""
    parts = ([], [], [])
    sink_total = None
    for b, tokens in enumerate(zip(*call.sequences, strict=True)):
        dtype = torch.float64 if precision is EXACT else call.case.dtype
        leaves = [x.detach().to(dtype).requires_grad_() for x in tokens]
        rule = call.rule
        if rule.sink is not None:
            rule = replace(rule, sink=rule.sink.detach().to(dtype).requires_grad_())
            leaves.append(rule.sink)
        result = oracle.attend(*leaves[:3], rule, b, precision)
        d_out, d_lse = cotangents.outs[b].to(result.out), cotangents.lses[b].to(result.lse)
        total = loss(result.out, result.lse, d_out, d_lse)
        if not total.requires_grad:
            grads = [torch.zeros_like(x) for x in leaves]
        else:
            grads = torch.autograd.grad(total, leaves, materialize_grads=True)
        for kept, grad in zip(parts, grads, strict=False):
            kept.append(grad)
        if rule.sink is not None:
            sink_total = grads[3] if sink_total is None else sink_total + grads[3]
    return parts, sink_total


def cut_gradient(call: harness.Call, grad: torch.Tensor, which: int) -> list[torch.Tensor]:
    """The gradient's rows of each sequence."""
    counts = [len(x) for x in call.sequences[which]]
    if which == 0:
        cu = call.tensors.get("cu_seqlens_q")
    else:
        cu = call.tensors.get("cu_seqlens_k")
        if "block_table" in call.tensors:
            return oracle.from_paged(grad, call.tensors["block_table"], counts)
    return oracle.from_dense(grad, counts) if cu is None else oracle.from_packed(grad, cu, counts)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients(fa4, case):
    """Every feature forward has, and nothing for tokens that do not count, NaN though they are."""
    call = harness.build(case, torch.device("cpu"))
    cotangents, grads, d_sink = kernel_gradients(fa4, call)
    exact, naive, mixed = (formula_gradients(call, cotangents, p) for p in (EXACT, NAIVE, MIXED))
    for which, name in enumerate(("dq", "dk", "dv")):
        assert grads[which].isfinite().all(), name
        ours = cut_gradient(call, grads[which], which)
        sizes = [sum(float(x.double().square().sum()) for x in xs) for xs in (ours, [grads[which]])]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4), f"{name}: outside the sequences"
        for b, grad in enumerate(ours):
            where = (exact[0][which][b], naive[0][which][b], mixed[0][which][b])
            acceptance.check_gradient(grad, *where, f"{name}, sequence {b}")
    if d_sink is not None:
        acceptance.check_gradient(d_sink, exact[1], naive[1], mixed[1], "dsink")


def test_gradients_add_up_on_shared_pages(fa4):
    """A page that two sequences read gets the sum of both gradients."""
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 4, 1, 8, generator=gen).requires_grad_() for _ in range(2))
    q = torch.randn(2, 1, 2, 8, generator=gen)
    table = torch.tensor([[2, 0], [2, 1]], dtype=torch.int32)
    lengths = torch.tensor([7, 8], dtype=torch.int32)
    out = fa4.flash_attn_varlen_func(q, k, v, block_table=table, seqused_k=lengths)
    grads = torch.autograd.grad(out.square().sum(), (k, v))
    gathered = [oracle.from_paged(x.double(), table, lengths) for x in (k, v)]
    total = sum(
        oracle.attend(q[b].double(), gathered[0][b], gathered[1][b], oracle.Rule())
        .out.square()
        .sum()
        for b in range(2)
    )
    for ours, truth in zip(grads, torch.autograd.grad(total, (k, v)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_only_what_asks_for_a_gradient_gets_one(fa4):
    """q alone, and k alone; the other inputs stay without."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    for asked in (q, k, v):
        asked.requires_grad_()
        fa4.flash_attn_func(q, k, v, causal=True).sum().backward()
        assert asked.grad is not None and asked.grad.isfinite().all()
        assert [x.grad is None for x in (q, k, v)].count(True) == 2
        asked.requires_grad_(False)
        asked.grad = None


def learned(requires_grad: bool = True):
    """By name, a call that would forget the gradient of what its name says."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    leaf = torch.rand(2).requires_grad_(requires_grad)
    factor = torch.rand(1, 2).requires_grad_(requires_grad)
    fp8 = [x.to(torch.float8_e4m3fn) for x in (k, v)]

    def biased(score, b, h, *_):
        return score + leaf[h]

    def by_aux(score, b, h, i, j, info, aux):
        return score + aux[0][h]

    dense, scale = ("flash_attn_func", (q, k, v)), {"softmax_scale": leaf[0].detach()}
    return {
        "alibi_slopes": (*dense, {"alibi_slopes": leaf}),
        "aux_tensors[0]": (*dense, {"score_mod": by_aux, "aux_tensors": [leaf]}),
        "score_mod": (*dense, {"score_mod": biased}),
        "k_descale": ("flash_attn_varlen_func", (q, *fp8), {"k_descale": factor}),
        "out": (*dense, {"out": torch.zeros_like(q).requires_grad_(requires_grad)}),
        "softmax_scale": (*dense, {n: x.requires_grad_(requires_grad) for n, x in scale.items()}),
    }


@pytest.mark.parametrize("name", learned())
def test_nothing_forgets_a_gradient(fa4, name):
    """What requires grad and has none is refused by name, called before or not."""
    function, given, options = learned(requires_grad=False)[name]
    expected = getattr(fa4, function)(*given, **options)
    function, _, options = learned()[name]
    error = ValueError if name == "softmax_scale" else NotImplementedError
    for call in (getattr(fa4, function), fa4.explain):
        with pytest.raises(error, match=re.escape(name)):
            call(*given, **options)
    with torch.no_grad():
        out = getattr(fa4, function)(*given, **options)
    assert out.shape == expected.shape and out.grad_fn is None
    if name in ("score_mod", "alibi_slopes"):
        torch._dynamo.reset()
        compiled = torch.compile(getattr(fa4, function), backend="eager")
        with pytest.raises(error, match=re.escape(name)):
            compiled(*given, **options)
        torch._dynamo.reset()


weight = torch.nn.Parameter(torch.ones(2))  # read by none that names an attribute so


class Learned(torch.nn.Module):
    """Functions of the scores beside parameters."""

    def __init__(self):
        super().__init__()
        self.w, self.weight, self.tables = 0.5, torch.nn.Parameter(torch.ones(2)), [weight, 2.0]
        self.inner = torch.nn.Linear(2, 2)

    def plain(self, score, *_):
        return score * self.w

    def learned(self, score, b, h, *_):
        return self._looked_up(score, h)

    def _looked_up(self, score, h):
        return score + self.inner.bias[h]

    def forward(self, score, b, h, *_):
        return score + self.weight[h]

    def closures(self, c):
        """Those that read no gradient, and those that do."""
        return (
            lambda score, *_: score * self.w,
            lambda score, *_: score * c.weight,
            lambda score, b, h, *_: score + self.weight[h].detach(),
            lambda score, b, h, *_: score * self.tables[1] + weight.data[h],
            functools.partial(lambda own, score, *_: score * own.w, self),
        ), (
            lambda score, b, h, *_: score + self.weight[h],
            lambda score, b, h, *_: score + weight[h],
            lambda score, b, h, *_: score + self.inner.weight[h, 0],
            lambda score, b, h, *_: self.plain(score) + self._looked_up(score, h),
            functools.partial(lambda own, score, b, h, *_: score + own.weight[h], self),
        )


def test_only_what_a_function_reads_is_looked_at(fa4):
    """Not what lies beside it, or has the name of an attribute."""
    layer, (q, k, v) = Learned(), (torch.randn(1, 5, 2, 8) for _ in range(3))
    passes, refused = layer.closures(SimpleNamespace(weight=2.0))
    for function in (layer.plain, *passes):
        fa4.flash_attn_func(q, k, v, score_mod=function)
    for function in (layer, layer.learned, *refused):
        with pytest.raises(NotImplementedError, match="score_mod"):
            fa4.flash_attn_func(q, k, v, score_mod=function)


def test_a_call_that_appends_is_recorded_by_nothing(fa4):
    """Decoding outside of torch.no_grad() works, with weights that require grad."""
    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    caches = [[torch.zeros(2, 4, 2, 8) for _ in range(2)] for _ in range(2)]
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    expected = fa4.flash_attn_with_kvcache(q, *caches[0], k, v, cache_seqlens=lengths)
    q, k, v = (x.clone().requires_grad_() * 1.0 for x in (q, k, v))
    out = fa4.flash_attn_with_kvcache(q, *caches[1], k, v, cache_seqlens=lengths)
    assert torch.equal(out, expected) and not out.requires_grad
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other) and not other.requires_grad


def test_gradients_repeat_bit_for_bit(fa4):
    """deterministic=True promises it."""
    q, k, v = (torch.randn(2, 70, 4, 32).requires_grad_() for _ in range(3))

    def grads():
        out = fa4.flash_attn_func(q, k, v, causal=True, deterministic=True)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    first = grads()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, grads(), strict=True))


@pytest.mark.gpu
def test_gradients_are_refused_on_a_gpu(fa4, device):
    """There is no backward kernel: said at the call, not at backward()."""
    q = torch.randn(1, 8, 2, 64, dtype=BF16, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="requires_grad"):
        fa4.flash_attn_func(q, q, q)
