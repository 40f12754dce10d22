"""Bitwise equality: across repeats, batch sizes, chunks of queries, neighbours on the device.

The kernels promise it. The cpu variant promises repeats only: its matrix products are PyTorch's,
whose order of summation depends on the sizes.
"""

import pytest
import torch

from . import cases, harness
from .cases import BF16, F16, Case

REPEATS_GPU, REPEATS_CPU = 1000, 5


def rows(call: harness.Call, fa4, **cuts: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the call cut to these batches, queries and keys.

    num_splits=1 and pack_gqa=False: results do not depend on how many queries there are.
    """
    batch, queries = cuts.get("batch", slice(None)), cuts.get("queries", slice(None))
    keys = cuts.get("keys", slice(None))
    q = call.q[batch, queries]
    k, v = call.k[batch, keys], call.v[batch, keys]
    return fa4.flash_attn_func(q, k, v, return_lse=True, pack_gqa=False, **call.options)


@pytest.mark.parametrize("layout", ["dense", "varlen"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_fa2229_repeats_are_bitwise_equal(fa4, device, layout, dtype):
    """FA#2229, FA#2033: races in shared memory showed once in many runs."""
    sq, sk = ((300,) * 3, (700,) * 3) if layout == "dense" else cases.VARLEN_LENGTHS["ragged"]
    case = Case(
        name="repeat", layout=layout, dtype=dtype, seqlens_q=sq, seqlens_k=sk, causal=True, heads=8
    )
    call = harness.build(case, device)
    first_out, first_lse = harness.run_uncut(fa4, call)
    count = REPEATS_GPU if device.type == "cuda" else REPEATS_CPU
    differs = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(count):
        out, lse = harness.run_uncut(fa4, call)
        differs |= (out.view(torch.int16) != first_out.view(torch.int16)).any()
        differs |= (lse.view(torch.int32) != first_lse.view(torch.int32)).any()
    assert not differs
    harness.judge(call, harness.cut(call, first_out, first_lse))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", cases.MASKS)
def test_fa2595_rows_do_not_depend_on_the_batch(fa4, device, mask):
    """FA#2595: each sequence alone gives the bits that it gives in the batch."""
    base = {"seqlens_q": (200,) * 5, "seqlens_k": (333,) * 5, **cases.MASKS[mask]}
    call = harness.build(Case(name=f"batch_{mask}", **base), device)
    out, lse = rows(call, fa4)
    for b in range(5):
        alone, alone_lse = rows(call, fa4, batch=slice(b, b + 1))
        assert torch.equal(alone[0], out[b])
        assert torch.equal(alone_lse[0], lse[b])


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 16, 100, 128, 200])
@pytest.mark.parametrize("window", [(None, None), (70, 0)], ids=["causal", "window"])
def test_fa2595_chunked_prefill_gives_the_same_bits(fa4, device, chunk, window):
    """FA#2595: masked tiles computed exp2 otherwise than unmasked ones.

    Causal prefill in chunks, each against the keys up to its end, equals prefill at once.
    """
    length = 400
    case = Case(name="chunks", seqlens_q=(length,), seqlens_k=(length,), causal=True, window=window)
    call = harness.build(case, device)
    out, lse = rows(call, fa4)
    for start in range(0, length, chunk) if chunk > 1 else (0, 63, 64, 127, 128, 255, 256, 399):
        end = min(start + chunk, length)
        part, part_lse = rows(call, fa4, queries=slice(start, end), keys=slice(0, end))
        assert torch.equal(part[0], out[0, start:end])
        assert torch.equal(part_lse[0], lse[0, :, start:end])


def test_rows_do_not_depend_on_packing(fa4, device):
    """Packed sequences in another order give the same bits."""
    sq, sk = cases.VARLEN_LENGTHS["ragged"]
    call = harness.build(
        Case(name="order", layout="varlen", seqlens_q=sq, seqlens_k=sk, causal=True), device
    )
    answer = harness.run(fa4, call)
    order = [2, 0, 3, 1]
    joined = [torch.cat([xs[b] for b in order]) for xs in call.sequences]
    starts = [torch.tensor([0] + [lengths[b] for b in order]) for lengths in (sq, sk)]
    cu_q, cu_k = (x.cumsum(0).to(device, torch.int32) for x in starts)
    out, lse = fa4.flash_attn_varlen_func(
        *joined, cu_q, cu_k, max(sq), max(sk), causal=True, num_splits=1, return_lse=True
    )
    for place, b in enumerate(order):
        span = slice(int(cu_q[place]), int(cu_q[place + 1]))
        assert torch.equal(out[span], answer.outs[b])
        assert torch.equal(lse[:, span], answer.lses[b])


def test_back_to_back_launches_of_different_shapes(fa4, device):
    """A launch that ends while the next begins: 60 calls queued without a wait, checked after."""
    shapes = [(1, 700), (257, 257), (64, 64), (300, 5), (513, 129), (2, 2)]
    calls = [
        harness.build(
            Case(name=f"queue_{sq}x{sk}", seqlens_q=(sq,) * b, seqlens_k=(sk,) * b, causal=True),
            device,
        )
        for b in (1, 3)
        for sq, sk in shapes
    ]
    answers = [(call, harness.run_uncut(fa4, call)) for _ in range(5) for call in calls]
    for call, answer in answers[: len(calls)]:
        harness.judge(call, harness.cut(call, *answer))
    for place, (_, (out, lse)) in enumerate(answers):
        first_out, first_lse = answers[place % len(calls)][1]
        assert torch.equal(out, first_out)
        assert torch.equal(lse, first_lse)


@pytest.mark.gpu
def test_two_streams_at_once(fa4, device):
    """Nothing is shared between launches: no workspace, no counter."""
    calls = [
        harness.build(Case(name=f"stream{n}", seqlens_q=(500 + n,), seqlens_k=(600,)), device)
        for n in range(4)
    ]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    answers = []
    for _ in range(20):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                answers.append(harness.run_uncut(fa4, call))
    torch.cuda.synchronize()
    for place, answer in enumerate(answers):
        call = calls[place % len(calls)]
        assert torch.equal(answer[0], answers[place % len(calls)][0])
        if place < len(calls):
            harness.judge(call, harness.cut(call, *answer))
