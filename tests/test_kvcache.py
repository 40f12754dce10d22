"""Attention over a cache: paged, indexed, appended to in place, with rotary embedding."""

import math

import pytest
import torch

from . import acceptance, append_cases, cases, harness, inputs, oracle
from .append_cases import HEADS, HEADS_KV, D, append_params, verify
from .cases import BF16, F16, F32, FP8, Case
from .oracle import Rule


@pytest.mark.parametrize("case", cases.PAGES, ids=str)
def test_page_sizes_and_tables(fa4, device, case):
    """FA#2303, FA#2368, fi#4347, sgl#35757: any page size, shuffled, garbage past the end."""
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("case", cases.CHUNKS + cases.FP8_CHUNKS, ids=str)
def test_many_queries_on_pages_and_splits(fa4, device, case):
    """Chunked prefill: the kernel for many rows reads pages and splits keys too."""
    harness.verify(fa4, case, device)


def test_pages_shared_between_sequences(fa4, device):
    """Two sequences with a common prefix read the same pages; tables need not ascend."""
    gen = torch.Generator().manual_seed(0)
    size, shared, own = 16, [5, 2], [[7, 0], [3, 6]]
    pages_k, pages_v = (torch.randn(8, size, HEADS_KV, D, generator=gen) for _ in range(2))
    q = torch.randn(2, 3, HEADS, D, generator=gen)
    pages_k, pages_v, q = (x.to(BF16).to(device) for x in (pages_k, pages_v, q))
    table = torch.tensor([shared + x for x in own], dtype=torch.int32, device=device)
    lengths = torch.tensor([50, 64], dtype=torch.int32, device=device)

    def call():
        return fa4.flash_attn_with_kvcache(
            q, pages_k, pages_v, cache_seqlens=lengths, block_table=table, causal=True
        )

    out = call()
    ks, vs = (oracle.from_paged(x, table, lengths) for x in (pages_k, pages_v))
    for b in range(2):
        ref = acceptance.reference(q[b], ks[b], vs[b], Rule(causal=True), b)
        acceptance.check(out[b], None, ref, f"sequence {b}")


def test_page_numbers_far_beyond_the_batch(fa4, device):
    """Continuous batching: few sequences, page numbers far apart in a large cache."""
    case = Case(
        name="far_pages", layout="paged_dense", page_size=4, seqlens_q=(1, 1),
        seqlens_k=(50, 50), used_k=(50, 9), d=64,
    )  # fmt: skip
    call = harness.build(case, device)
    spread = 300
    for name in ("k", "v"):
        old = getattr(call, name)
        new = old.new_full((old.shape[0] * spread, *old.shape[1:]), math.nan)
        new[::spread] = old
        setattr(call, name, new)
    table = call.tensors["block_table"]
    inside = (table >= 0) & (table != inputs.JUNK_PAGE)
    call.tensors["block_table"] = torch.where(inside, table * spread, table)
    harness.judge(call, harness.run(fa4, call))


@pytest.mark.parametrize("kind", [int, torch.tensor, None], ids=["int", "0d", "none"])
def test_cache_seqlens_as_one_number(fa4, device, kind):
    """One length for all, or none: the whole cache."""
    call = harness.build(Case(name="one_length", seqlens_q=(2,) * 3, seqlens_k=(70,) * 3), device)
    length = 70 if kind is None else 33
    given = None if kind is None else kind(length)
    options = {"cache_seqlens": given, "causal": True, "return_lse": True}
    out, lse = fa4.flash_attn_with_kvcache(call.q, call.k, call.v, **options)
    for b in range(3):
        q, k, v = call.q[b], call.k[b, :length], call.v[b, :length]
        acceptance.check(out[b], lse[b], acceptance.reference(q, k, v, Rule(causal=True)))


def test_cache_batch_idx_chooses_rows(fa4, device):
    """Sequences take rows of a larger cache, in any order, one of them twice."""
    gen = torch.Generator().manual_seed(2)
    cache_k, cache_v = (torch.randn(7, 40, HEADS_KV, D, generator=gen) for _ in range(2))
    q = torch.randn(4, 2, HEADS, D, generator=gen)
    cache_k, cache_v, q = (x.to(BF16).to(device) for x in (cache_k, cache_v, q))
    rows = torch.tensor([5, 0, 6, 5], dtype=torch.int32, device=device)
    lengths = torch.tensor([40, 7, 1, 20], dtype=torch.int32, device=device)

    def call():
        return fa4.flash_attn_with_kvcache(
            q, cache_k, cache_v, cache_seqlens=lengths, cache_batch_idx=rows, causal=True
        )

    out = call()
    ks, vs = (oracle.from_dense(x, lengths, rows) for x in (cache_k, cache_v))
    for b in range(4):
        acceptance.check(out[b], None, acceptance.reference(q[b], ks[b], vs[b], Rule(causal=True)))


# --- append -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", append_params)
def test_append_then_attend(fa4, device, how):
    """New tokens land at cache_seqlens, rotated; nothing else of the cache changes; then attend."""
    if device.type == "cuda" and (missing := how.missing_on_gpu()):
        with pytest.raises(NotImplementedError, match=missing):
            verify(fa4, how, device)
        return
    verify(fa4, how, device)


WRONG_FP8 = {
    "descale_of_other_dtype": ({"fp8": False, "k_descale": (2, 2)}, ValueError, "k_descale="),
    "descale_shape": ({"v_descale": (2, 4)}, ValueError, r"v_descale.shape=\(2, 4\)"),
    "descale_dtype": ({"k_descale": (2, 2), "dtype": F16}, TypeError, "k_descale.dtype="),
    "only_k": ({"only_k": True}, TypeError, "k.dtype="),
}


@pytest.mark.parametrize("name", WRONG_FP8)
def test_wrong_fp8_caches(fa4, name):
    """Named before anything is written."""
    wrong, kind, message = WRONG_FP8[name]
    k, v = (torch.zeros(2, 8, 2, D, dtype=BF16) for _ in range(2))
    if wrong.get("fp8", True):
        k = k.to(FP8)
        v = v if wrong.get("only_k") else v.to(FP8)
    q, new = torch.ones(2, 1, 4, D, dtype=BF16), torch.ones(2, 1, 2, D, dtype=BF16)
    descales = {
        key: torch.ones(shape, dtype=wrong.get("dtype", F32))
        for key, shape in wrong.items()
        if key.endswith("descale")
    }
    with pytest.raises(kind, match=message):
        fa4.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=0, **descales)
    assert (k.float() == 0).all() and (v.float() == 0).all()


def test_fa2716_fp8_saturates(fa4, device):
    """FA#2716: a new token beyond what e4m3 holds becomes +-448, not NaN."""
    cache = torch.zeros(2, 1, 4, 1, D, dtype=BF16, device=device).to(FP8)
    new = torch.full((1, 1, 1, D), 1e4, dtype=BF16, device=device)
    new[..., ::2] = -1e4
    descale = torch.full((1, 1), 2.0, device=device)
    out = fa4.flash_attn_with_kvcache(
        *(torch.ones_like(new), cache[0], cache[1], new, new), cache_seqlens=0,
        k_descale=descale, v_descale=descale,
    )  # fmt: skip
    assert torch.equal(cache[0, 0, 0].float(), 448 * new[0, 0].float().sign())
    assert torch.equal(out.float(), 896 * new.float().sign())


def test_decode_step_by_step_equals_prefill(fa4):
    """Token by token into a cache gives what one causal call gives, rotary included."""
    gen = torch.Generator().manual_seed(5)
    length = 20
    q, k, v = (torch.randn(1, length, 2, D, generator=gen) for _ in range(3))
    angle = torch.rand(length, D // 2, generator=gen) * 6.3
    cos, sin = angle.cos(), angle.sin()
    cache_k, cache_v = (torch.full((1, length, 2, D), math.nan) for _ in range(2))
    steps = [
        fa4.flash_attn_with_kvcache(
            *(q[:, t : t + 1], cache_k, cache_v, k[:, t : t + 1], v[:, t : t + 1]),
            cache_seqlens=t, rotary_cos=cos, rotary_sin=sin, causal=True,
        )
        for t in range(length)
    ]  # fmt: skip
    turned = [
        oracle.rotate(x[0], cos, sin, list(range(length)), True).float()[None] for x in (q, k)
    ]
    whole = fa4.flash_attn_func(*turned, v, causal=True)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_a_captured_step_decodes_a_whole_sequence(fa4, device, layout):
    """One graph, captured once, appends and attends 60 times; a row of padding joins in between.

    Each step gives the bits of the same call made eagerly on a copy of the cache.
    """
    gen = torch.Generator().manual_seed(8)
    batch, size, capacity, heads = 3, 16, 64, (8, 2)
    q, k, v = (
        torch.randn(batch, 1, n, D, generator=gen).to(device, BF16) for n in (*heads, heads[1])
    )
    angle = torch.rand(capacity, D // 2, generator=gen) * 6.3
    options = {
        "rotary_cos": angle.cos().to(device, BF16), "rotary_sin": angle.sin().to(device, BF16),
        "cache_seqlens": torch.zeros(batch, dtype=torch.int32, device=device), "causal": True,
    }  # fmt: skip
    shape = (batch, capacity, heads[1], D)
    if layout == "paged":
        pages = batch * capacity // size
        order = torch.randperm(pages, generator=gen).reshape(batch, -1)
        options["block_table"] = order.to(device, torch.int32)
        shape = (pages, size, heads[1], D)
    eager, captured = (
        [torch.full(shape, math.nan, dtype=BF16, device=device) for _ in range(2)] for _ in range(2)
    )
    fa4.flash_attn_with_kvcache(q, *eager, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa4.flash_attn_with_kvcache(q, *captured, k, v, **options)
    for x in (*eager, *captured):
        x.fill_(math.nan)
    for step in range(60):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, generator=gen))
        lengths = torch.tensor([step, max(0, step - 5), -1 if step % 3 else step // 3])
        options["cache_seqlens"].copy_(lengths)
        graph.replay()
        expected = fa4.flash_attn_with_kvcache(q, *eager, k, v, **options)
        assert torch.equal(out, expected) and out.isfinite().all()
        for x, y in zip(captured, eager, strict=True):
            append_cases.same_bits(x, y)


def test_fp8_pages_by_every_entry_point(fa4, device):
    """The packed entry points take descales too, as serving engines pass them."""
    gen = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=gen).to(device)

    q = randn(3, 4, D).to(BF16)
    k, v = (randn(6, 16, 2, D).to(FP8) for _ in range(2))
    starts, lengths = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 3], [20, 40])
    )
    table = torch.tensor([[5, 1, -1], [0, 2, 4]], dtype=torch.int32, device=device)
    scales = {name: randn(2, 2).abs() + 0.5 for name in ("k_descale", "v_descale")}
    paged = {"causal": True, "cu_seqlens_q": starts, "max_seqlen_q": 2, **scales}
    expected = fa4.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, block_table=table, **paged
    )
    paged["seqused_k"] = lengths
    assert fa4.flash_attn_varlen_func(q, k, v, block_table=table, **paged).equal(expected)
    assert fa4._flash_attn_fwd(q, k, v, page_table=table, num_splits=0, **paged)[0].equal(expected)
    plain = fa4.flash_attn_varlen_func(
        q,
        k.to(BF16),
        v.to(BF16),
        block_table=table,
        **{**paged, "k_descale": None, "v_descale": None},
    )
    assert not plain.equal(expected)
