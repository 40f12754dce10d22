"""Strides, alignment and addresses: the same numbers lie differently in memory."""

import pytest
import torch

from . import acceptance, harness
from .cases import BF16, STRIDES, Case
from .oracle import Rule

FAR = 2**31 + 2**20  # elements: beyond what a 32-bit index reaches


@pytest.mark.parametrize("case", STRIDES, ids=str)
def test_strides_and_alignment(fa4, device, case):
    """FA#2665, FA#2670, FA#2745: strides and alignment ignored."""
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_one_kernel_across_layouts(fa4, device, layout):
    """FA#2745: a kernel compiled for one layout served another. Answers agree bit for bit."""
    base = {"layout": layout, "seqlens_q": (90, 90), "seqlens_k": (150, 150), "causal": True}
    answers = []
    for strides in ("contiguous", "transposed", "padded", "sliced", "contiguous"):
        case = Case(name="one_kernel", strides=strides, **base)
        call = harness.build(case, device)
        answers.append(harness.run(fa4, call))
        harness.judge(call, answers[-1])
    assert all(harness.same_bits(answers[0], other) for other in answers[1:])


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_stride_of_a_dimension_of_one_is_ignored(fa4, device, which):
    """PyTorch gives dimensions of size 1 any stride, 0 and odd ones included."""
    case = Case(name="size_one", heads=1, heads_kv=1, seqlens_q=(70,), seqlens_k=(70,))
    call = harness.build(case, device)
    x = getattr(call, which)
    setattr(call, which, x.as_strided(x.shape, (1, x.stride(1), 3, 1)))
    harness.judge(call, harness.run(fa4, call))


def needs_memory(device: torch.device, gib: int) -> None:
    """Skip where a GPU has less memory free; a CPU backs only the pages that are touched."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < (gib + 4) << 30:
            pytest.skip(f"needs {gib + 4} GiB of GPU memory")


def far_apart(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x (b, s, h, d) with its batches `stride` elements apart; nothing between is touched."""
    store = torch.empty((len(x) - 1) * stride + x[0].numel(), dtype=x.dtype, device=x.device)
    out = store.as_strided(x.shape, (stride, *x.stride()[1:]))
    return out.copy_(x)


def test_fa2662_strides_beyond_32_bits(fa4, device):
    """FA#2662, FA#2214: batches, and rows of out, more than 2^31 elements apart."""
    needs_memory(device, 20)
    case = Case(name="far_apart", seqlens_q=(70,) * 2, seqlens_k=(130,) * 2, causal=True, heads=2)
    call = harness.build(case, device)
    call.q, call.k, call.v = (far_apart(x, FAR) for x in (call.q, call.k, call.v))
    out = far_apart(torch.zeros_like(call.q, memory_format=torch.contiguous_format), FAR)
    _, lse = fa4.flash_attn_func(call.q, call.k, call.v, out=out, return_lse=True, **call.options)
    harness.judge(call, harness.cut(call, out, lse))


@pytest.mark.gpu
def test_fa2214_more_than_two_to_the_31_elements_of_keys(fa4, device):
    """The last sequence begins past element 2^31 of packed K and V; the long one has no query."""
    needs_memory(device, 10)
    heads_kv, d, tail = 8, 128, 200
    skipped = FAR // (heads_kv * d)
    k = torch.zeros(skipped + tail, heads_kv, d, dtype=BF16, device=device)
    v = torch.zeros_like(k)
    k[skipped:].normal_()
    v[skipped:].normal_()
    q = torch.randn(50, 8, d, device=device).to(BF16)
    cu_q = torch.tensor([0, 0, 50], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, skipped, skipped + tail], dtype=torch.int32, device=device)
    out, lse = fa4.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 50, skipped, causal=True, return_lse=True
    )
    ref = acceptance.reference(q, k[skipped:], v[skipped:], Rule(causal=True))
    acceptance.check(out, lse, ref, "past 2^31")


@pytest.mark.gpu
def test_fa2662_one_sequence_of_four_million_keys(fa4, device):
    """seqlen_k * (d + d_v) * 2 > 2^31 bytes within one sequence.

    A few keys, spread from the first to the last, hold nearly all the weight: one of them read
    from a wrong address changes the answer.
    """
    needs_memory(device, 40)
    keys, d = (1 << 22) + 77, 128
    gen = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 1, d, device=device, dtype=BF16, generator=gen) for n in (2, keys, keys)
    )
    for place in (0, 1 << 20, (1 << 21) + 1, 1 << 22, keys - 1):
        k[:, place] = 2 * q.sum(1)  # scores near 22, against 15 for the sum of all the others
    out, lse = fa4.flash_attn_func(q, k, v, causal=True, return_lse=True)
    ref = acceptance.reference(q[0], k[0], v[0], Rule(causal=True))
    acceptance.check(out[0], lse[0], ref, "four million keys")
