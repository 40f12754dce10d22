"""Calls that run at once are seen by PyTorch's modes, transforms and tracers, as operators are."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from . import block_masks


def qkv(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 12, heads, 8, generator=generator) for heads in (4, 2, 2)]


class Wrapped(torch.Tensor):
    """Has no memory of its own; `seen` are the operators that came by."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        cls.seen.append(operator._opname)
        plain = [x.inner if isinstance(x, cls) else x for x in args]
        return operator(*plain, **(kwargs or {}))


class Seen(TorchDispatchMode):
    """The operators that are called while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator._opname)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", range(3))
def test_subclasses_of_tensor_go_through_the_operator(fa4, place):
    """Whichever of the tensors is one: its address is not that of its values."""
    given = qkv()
    expected = fa4.flash_attn_func(*given)
    given[place] = Wrapped(given[place])
    Wrapped.seen.clear()
    assert torch.equal(fa4.flash_attn_func(*given), expected)
    assert Wrapped.seen == ["forward"]


def test_subclasses_among_the_optional_tensors(fa4):
    lengths = torch.tensor([3, 12], dtype=torch.int32)
    q, k, v = qkv()
    new = [t[:, :1] for t in (q, k, v)]
    expected_cache, cache = ([k.clone(), v.clone()] for _ in range(2))
    expected = fa4.flash_attn_with_kvcache(
        q, *expected_cache, *new[1:], cache_seqlens=lengths - 1, causal=True
    )
    Wrapped.seen.clear()
    found = fa4.flash_attn_with_kvcache(
        q, *cache, new[1], Wrapped(new[2]), cache_seqlens=Wrapped(lengths - 1), causal=True
    )
    assert Wrapped.seen[-1] == "with_kvcache"
    for a, b in zip((expected, *expected_cache), (found, *cache), strict=True):
        assert torch.equal(a, b)


def test_modes_see_the_operator(fa4):
    """A mode sees one operator, and a trace calls it rather than holding its result."""
    given = qkv()
    with Seen() as mode:
        fa4.flash_attn_func(*given, causal=True)
    assert mode.names == ["forward"]

    def causal(q, k, v):
        return fa4.flash_attn_func(q, k, v, causal=True)

    traces = [
        make_fx(causal, tracing_mode="real")(*qkv()),
        torch.jit.trace(causal, tuple(qkv()), check_trace=False),
    ]
    for trace in traces:
        assert torch.equal(trace(*qkv(seed=1)), causal(*qkv(seed=1)))
    mapped = torch.func.vmap(causal)(*(torch.stack([t, t]) for t in qkv()))
    assert torch.equal(mapped[1], causal(*qkv()))


def test_negative_views_count_with_their_sign(fa4):
    q, k, v = qkv()
    expected = fa4.flash_attn_func(-q, k, -v)
    with Seen() as mode:
        assert torch.equal(fa4.flash_attn_func(torch._neg_view(q), k, torch._neg_view(v)), expected)
    assert "forward" in mode.names


def test_operations_are_counted(fa4):
    """Two for each product, as PyTorch counts its own attention; of each sequence by itself."""
    q, k, v = qkv()
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    calls = {
        lambda: fa4.flash_attn_func(q, k, v): 2 * 12 * 12,
        lambda: fa4.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 7, 7): 5 * 5 + 7 * 7,
        lambda: fa4.flash_attn_with_kvcache(
            q[:, :1], k, v, k[:, :1], v[:, :1], cache_seqlens=cu[1:] - 5
        ): 1 + 8,
        lambda: fa4.flash_attn_with_kvcache(
            q, k[:1], v[:1], cache_batch_idx=torch.zeros(2, dtype=torch.int32)
        ): 2 * 12 * 12,
        lambda: fa4.flash_attn_varlen_func(
            q, k, v, seqused_q=torch.tensor([-1, 3], dtype=torch.int32)
        ): 3 * 12,
    }
    for call, pairs in calls.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert counter.get_total_flops() == 4 * pairs * 2 * (8 + 8)
    (packet,) = (x for x in fa4.ops.flops.formulas if x.__name__ == "forward")
    with FlopCounterMode(display=False, custom_mapping={packet: lambda *_, **__: 7}) as counter:
        fa4.flash_attn_func(q, k, v)
    assert counter.get_total_flops() == 7
    with FlopCounterMode(display=False) as counter:
        fa4.flash_attn_func(q.requires_grad_(), k, v).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 12 * 12 * 2 * (8 + 8 + 5 * 8)


def test_forward_mode_is_refused(fa4):
    """Its derivative would be dropped; tensors without a tangent are welcome."""
    q, k, v = qkv()
    with forward_ad.dual_level():
        fa4.flash_attn_func(q, k, v)
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        for call in (fa4.flash_attn_func, fa4.explain):
            with pytest.raises(NotImplementedError, match="v=a dual tensor.*forward-mode"):
                call(q, k, dual)
        lengths, new = torch.tensor([3, 9], dtype=torch.int32), k[:, :1]
        with pytest.raises(NotImplementedError, match="v_cache=a dual tensor"):
            fa4.flash_attn_with_kvcache(q[:, :1], k, dual, new, new, cache_seqlens=lengths)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(fa4.flash_attn_func, backend="eager", fullgraph=True)(q, k, dual)
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="q=a dual tensor"):
        torch.func.jvp(lambda q: fa4.flash_attn_func(q, k, v), (q,), (q,))


def test_explain_refuses_what_the_call_does(fa4):
    """Because of what a tensor is, or of who watches."""
    q, k, v = qkv()
    with pytest.raises(TypeError, match="k=a sparse_coo tensor"):
        fa4.explain(q, k.to_sparse(), v)
    with pytest.raises(NotImplementedError, match="torch.func=grad"):
        torch.func.grad(lambda q: len(fa4.explain(q, k, v)) * q.sum())(q)
    lists = block_masks.lists(torch.ones(1, 1, 1, 1, dtype=torch.int64), (128, 128))
    call = {"q": q, "k": k, "v": v, "block_sparse_tensors": lists}
    with Seen():
        for function in ((fa4._flash_attn_fwd,), (fa4.explain, fa4._flash_attn_fwd)):
            with pytest.raises(NotImplementedError, match="block_sparse_tensors=given"):
                function[0](*function[1:], **call)
