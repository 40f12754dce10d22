"""Few queries against many keys: split keys, packed heads, graphs that replay at other lengths."""

import random

import pytest
import torch

from . import acceptance, cases, harness
from .cases import BF16, FP8, Case
from .oracle import Rule


@pytest.mark.parametrize("case", cases.DECODE, ids=str)
def test_decode(fa4, device, case):
    harness.verify(fa4, case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 4, 19])
def test_rows_do_not_depend_on_the_batch(fa4, device, splits):
    """At a number of splits that the caller fixes, each sequence alone gives the batch's bits."""
    lengths = (3000, 1, 777, 64)
    case = Case(
        name="batch", layout="varlen", seqlens_q=(1,) * 4, seqlens_k=(3000,) * 4, used_k=lengths,
        num_splits=splits, causal=True,
    )  # fmt: skip
    call = harness.build(case, device)
    answer = harness.run(fa4, call)
    for b, (q, k, v) in enumerate(zip(*call.sequences, strict=True)):
        alone = fa4.flash_attn_func(
            q[None], k[None], v[None], causal=True, num_splits=splits, return_lse=True
        )
        assert torch.equal(alone[0][0], answer.outs[b])
        assert torch.equal(alone[1][0], answer.lses[b])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_fa2229_repeats_are_bitwise_equal(fa4, device, layout):
    """1000 launches, split and merged, give the same bits."""
    q, cache, lengths, table = step(device, layout, batch=5, capacity=4096)
    lengths.copy_(torch.tensor([4096, 0, 1, 2500, -1], dtype=torch.int32))

    def call():
        return fa4.flash_attn_with_kvcache(
            q, *cache, cache_seqlens=lengths, block_table=table, causal=True, num_splits=7
        )

    first = call()
    differs = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(1000):
        differs |= (call().view(torch.int16) != first.view(torch.int16)).any()
    assert not differs


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_waits_for_what_the_stream_has_before_it(fa4, device, splits):
    """Launched early, it neither reads nor writes before a long kernel and a copy have ended."""
    case = Case(
        name="early", seqlens_q=(478,) * 3, seqlens_k=(348,) * 3, heads=4, heads_kv=2, d=64,
        dtype=BF16, window=(None, 0), num_splits=splits, pack_gqa=True,
    )  # fmt: skip
    call = harness.build(case, device)
    right, _ = harness.run_uncut(fa4, call)
    queries, late = call.q.clone(), torch.empty(1 << 28, dtype=BF16, device=device)
    given = late[-right.numel() :].view_as(right)
    differs = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(100):
        call.q.zero_()
        late.fill_(torch.nan)
        call.q.copy_(queries)
        harness.run_uncut(fa4, call, out=given)
        differs |= (given.view(torch.int16) != right.view(torch.int16)).any()
    assert not differs


def step(device: torch.device, layout: str, batch: int, capacity: int):
    """q (b, 1, 8, 64), (k, v) of 2 heads, lengths, and a table of shuffled pages or None.

    layout: "dense", "paged", "fp8", pages of e4m3, or "chunks", 50 queries a sequence over pages.
    """
    gen = torch.Generator(device).manual_seed(0)
    size, tables = 16, None
    shape = (batch, capacity, 2, 64)
    if layout != "dense":
        pages = batch * capacity // size
        shape = (pages, size, 2, 64)
        order = torch.randperm(pages, generator=gen, device=device)
        tables = order.to(torch.int32).view(batch, capacity // size)
    queries, kept = 50 if layout == "chunks" else 1, FP8 if layout == "fp8" else BF16
    q = torch.randn(batch, queries, 8, 64, generator=gen, device=device).to(BF16)
    cache = [torch.randn(shape, generator=gen, device=device).to(kept) for _ in range(2)]
    return q, cache, torch.empty(batch, dtype=torch.int32, device=device), tables


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dense", "paged", "fp8", "chunks"])
def test_fi4002_one_graph_replays_at_fifty_lengths(fa4, device, layout):
    """fi#4002: captured at one length, replayed at others, longer, 0 and -1 included."""
    batch, capacity = 6, 2048
    q, cache, lengths, table = step(device, layout, batch, capacity)
    lengths.fill_(100)

    def call():
        return fa4.flash_attn_with_kvcache(
            q, *cache, cache_seqlens=lengths, block_table=table, causal=True, return_lse=True
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    draw = random.Random(0)
    edges = [[-1] * batch, [0] * batch, [capacity] * batch, [1, 63, 64, 65, 0, -1]]
    for replay in range(50):
        wanted = edges[replay] if replay < len(edges) else None
        wanted = wanted or [draw.randint(-1, capacity) for _ in range(batch)]
        lengths.copy_(torch.tensor(wanted, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        eager_out, eager_lse = call()
        assert torch.equal(out, eager_out) and torch.equal(lse, eager_lse)
        if replay < 8:
            check_step(q, cache, table, wanted, (out, lse))


@pytest.mark.gpu
def test_metadata_of_a_step_serves_every_layer(fa4, device):
    """Made once, outside of the graph; every layer's call gives the bits that it gives without."""
    batch, capacity, layers = 3, 4096, 4
    steps = [step(device, "paged", batch, capacity) for _ in range(layers)]
    lengths = torch.full((batch,), 100, dtype=torch.int32, device=device)
    made = fa4.get_scheduler_metadata(
        batch, 1, capacity, 8, 2, 64, lengths, page_size=16, causal=True
    )

    def calls(**more):
        options = {"cache_seqlens": lengths, "causal": True} | more
        return [
            fa4.flash_attn_with_kvcache(q, *cache, block_table=table, **options)
            for q, cache, _, table in steps
        ]

    calls(scheduler_metadata=made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = calls(scheduler_metadata=made)
    for wanted in ([4096, 1, 0], [5, -1, 3000]):
        lengths.copy_(torch.tensor(wanted, dtype=torch.int32))
        graph.replay()
        assert all(map(torch.equal, outs, calls()))


def check_step(q, cache, table, lengths: list[int], answer) -> None:
    """Each sequence of one step against the oracle; e4m3 is exact in the queries' dtype."""
    cache = [x.to(q.dtype) for x in cache]
    for b, length in enumerate(max(n, 0) for n in lengths):
        if table is None:
            k, v = (x[b, :length] for x in cache)
        else:
            k, v = (x[table[b].long()].flatten(0, 1)[:length] for x in cache)
        ref = acceptance.reference(q[b], k, v, Rule(causal=True), b)
        acceptance.check(answer[0][b], answer[1][b], ref, f"sequence {b} of length {length}")


@pytest.mark.gpu
@pytest.mark.parametrize("queries, keys", [(478, 348), (478, 384), (800, 700)])
def test_a_slot_is_read_before_it_is_filled_again(fa4, device, queries, keys):
    """Two CTAs an SM, keys for more than one turn of the ring: half of the launches were wrong."""
    gen = torch.Generator(device).manual_seed(10)
    shapes = [(3, queries, 4, 64), (3, keys, 2, 64), (3, keys, 2, 64)]
    q, k, v = (torch.randn(s, generator=gen, device=device).to(BF16) for s in shapes)

    def call():
        return fa4.flash_attn_func(q, k, v, causal=True, num_splits=1, pack_gqa=True)

    first, differs = call(), torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(200):
        differs |= (call().view(torch.int16) != first.view(torch.int16)).any()
    assert not differs
