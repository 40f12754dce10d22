"""Packed sequences and lengths that live in tensors."""

import numpy as np
import pytest
import torch

from . import cases, harness
from .cases import Case


def packed(name: str, **changes) -> Case:
    sq, sk = cases.VARLEN_LENGTHS["interleaved_zeros"]
    return Case(name=name, layout="varlen", seqlens_q=sq, seqlens_k=sk, **changes)


@pytest.mark.parametrize("case", cases.VARLEN, ids=str)
def test_packed_sequences(fa4, device, case):
    """cfe#575: sequences without keys or without queries between long ones."""
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("case", cases.USED, ids=str)
def test_tokens_past_what_is_used_are_never_read(fa4, device, case):
    """seqused_q, seqused_k: what lies behind is NaN and must not reach a result."""
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, torch.tensor], ids=lambda k: k.__name__)
def test_fa2143_max_seqlen_of_any_integer_type(fa4, device, kind):
    """FA#2143, FA#2507, FA#2298: an int, a NumPy integer and a 0-d tensor are the same call."""
    call = harness.build(packed("max_seqlen", causal=True), device)
    plain = harness.run(fa4, call)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        call.tensors[name] = kind(call.tensors[name])
    assert harness.same_bits(plain, harness.run(fa4, call))


def test_max_seqlen_on_the_device(fa4, device):
    """As transformers passes it for packed sequences: the same answer, and nothing is read back."""
    call = harness.build(packed("max_seqlen", causal=True), device)
    plain = harness.run(fa4, call)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        call.tensors[name] = torch.tensor(call.tensors[name], dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        answer = harness.run_uncut(fa4, call)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert harness.same_bits(plain, harness.cut(call, *answer))


@pytest.mark.parametrize("slack", [1, 100, 5000])
def test_max_seqlen_may_exceed_every_length(fa4, device, slack):
    """Engines pad the maxima (powers of two, graph buckets): the same answer, bit for bit."""
    call = harness.build(packed("max_seqlen_slack", causal=True), device)
    plain = harness.run(fa4, call)
    call.tensors["max_seqlen_q"] += slack
    call.tensors["max_seqlen_k"] += slack
    assert harness.same_bits(plain, harness.run(fa4, call))


def test_tokens_behind_the_last_sequence_are_never_read(fa4, device):
    """cu_seqlens may end before the packed tensors do; what lies behind is NaN."""
    call = harness.build(packed("tail", causal=True), device)
    whole = harness.run(fa4, call)
    call.q, call.k, call.v = (
        torch.cat([x, torch.full_like(x[:50], float("nan"))]) for x in (call.q, call.k, call.v)
    )
    assert harness.same_bits(whole, harness.run(fa4, call))


def test_out_of_packed_queries_is_written_in_place(fa4, device):
    """out= with NaN in it: every row of a sequence is written, those without keys with zeros."""
    call = harness.build(packed("varlen_out"), device)
    out = torch.full_like(call.q, float("nan"))
    answer = harness.run(fa4, call, out=out)
    harness.judge(call, answer)
    assert answer.outs[2].data_ptr() == out[5:].data_ptr()


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_rows_outside_every_sequence_are_zero(fa4, device, layout):
    """Queries past seqused_q or behind the last sequence: out = 0, LSE = -inf, no stale memory."""
    lengths = (130, 300) if layout == "varlen" else (300, 300)
    case = Case(
        name="outside", layout=layout, seqlens_q=lengths, seqlens_k=(200, 200), used_q=(7, 129),
        causal=True,
    )  # fmt: skip
    call = harness.build(case, device)
    if layout == "varlen":
        call.q = torch.cat([call.q, torch.full_like(call.q[:20], float("nan"))])
    stale = torch.full_like(call.q, float("nan"))  # what the allocator may hand out again
    del stale
    out, lse = harness.run_uncut(fa4, call)
    harness.judge(call, harness.cut(call, out, lse))
    rows = out if layout == "varlen" else out.flatten(0, 1)
    lses = lse if layout == "varlen" else lse.transpose(0, 1).flatten(1)
    second = case.seqlens_q[0]
    outside = torch.ones(len(rows), dtype=torch.bool, device=device)
    outside[:7], outside[second : second + 129] = False, False
    assert (rows[outside] == 0).all()
    assert (lses[:, outside] == float("-inf")).all()


def test_the_call_of_serving_engines(fa4, device):
    """_flash_attn_fwd, with its own names for window and sink, gives the same bits."""
    call = harness.build(packed("engine", causal=True, window=(60, 0)), device)
    plain = harness.run(fa4, call)
    out, lse = fa4._flash_attn_fwd(
        call.q, call.k, call.v, causal=True, window_size_left=60, window_size_right=None,
        return_lse=True, **call.tensors,
    )  # fmt: skip
    assert harness.same_bits(plain, harness.cut(call, out, lse))


def test_sequences_do_not_see_each_other(fa4, device):
    """NaN in one sequence changes no bit of another, though blocks of keys overlap it."""
    sq, sk = cases.VARLEN_LENGTHS["ragged"]
    case = Case(name="isolation", layout="varlen", seqlens_q=sq, seqlens_k=sk, window=(50, 20))
    call = harness.build(case, device)
    before = harness.run(fa4, call)
    starts = call.tensors["cu_seqlens_k"].tolist()
    call.k[starts[2] : starts[3]] = float("nan")
    call.v[starts[2] : starts[3]] = float("inf")
    after = harness.run(fa4, call)
    for b in (0, 1, 3):
        assert torch.equal(before.outs[b], after.outs[b])
        assert torch.equal(before.lses[b], after.lses[b])


@pytest.mark.gpu
def test_fi4002_graph_replay_follows_the_lengths(fa4, device):
    """fi#4002: a captured call answers for the lengths of the replay, longer and 0 included."""
    case = Case(
        name="graph", layout="varlen", seqlens_q=(1,) * 4, seqlens_k=(640,) * 4, used_k=(64,) * 4,
        causal=True,
    )  # fmt: skip
    call = harness.build(case, device)
    call.k.normal_(), call.v.normal_()
    harness.run(fa4, call)
    out = torch.empty_like(call.q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = harness.run_uncut(fa4, call, out=out)
    gen = torch.Generator().manual_seed(0)
    for step in range(50):
        used = [0, 640, 1, 65] if step == 0 else torch.randint(0, 641, (4,), generator=gen).tolist()
        call.tensors["seqused_k"].copy_(torch.tensor(used))
        graph.replay()
        keys = [call.k[b * 640 : b * 640 + n] for b, n in enumerate(used)]
        values = [call.v[b * 640 : b * 640 + n] for b, n in enumerate(used)]
        call.sequences = (call.sequences[0], keys, values)
        harness.judge(call, harness.cut(call, *answer))


@pytest.mark.gpu
def test_empty_batch_in_a_graph(fa4, device):
    """FA#2515: capture with nothing but padding."""
    case = Case(name="graph0", layout="varlen", seqlens_q=(4, 4), seqlens_k=(9, 9), used_k=(0, 0))
    call = harness.build(case, device)
    harness.run(fa4, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = harness.run_uncut(fa4, call)
    graph.replay()
    harness.judge(call, harness.cut(call, *answer))
