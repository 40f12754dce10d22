"""Attention over a cache: paged, indexed, appended to in place, with rotary embedding."""

import math
from dataclasses import dataclass

import pytest
import torch

from . import acceptance, cases, harness, inputs, oracle
from .cases import BF16, F16, F32, Case
from .oracle import Rule

HEADS, HEADS_KV, D = 4, 2, 64
CAPACITY = 96  # tokens a sequence's cache can hold
BEFORE = (0, 1, 63, 64, 90, -1)  # tokens already there; -1 is a padded row of a CUDA graph


@pytest.mark.parametrize("case", cases.PAGES, ids=str)
def test_page_sizes_and_tables(fa4, device, case):
    """FA#2303, FA#2368, fi#4347, sgl#35757: any page size, shuffled, garbage past the end."""
    harness.verify(fa4, case, device)


def refused_on_gpu(device: torch.device, argument: str):
    """What a GPU kernel lacks is refused by name; used as a context around the call."""
    if device.type == "cuda":
        return pytest.raises(NotImplementedError, match=argument)
    return None


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

    if refused := refused_on_gpu(device, "page_table|block_table"):
        with refused:
            call()
        return
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
    if device.type == "cuda":
        pytest.skip("paged K and V are refused; see test_page_sizes_and_tables")
    spread = 300
    for name in ("k", "v"):
        old = getattr(call, name)
        new = torch.full((old.shape[0] * spread, *old.shape[1:]), math.nan, dtype=old.dtype)
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

    if refused := refused_on_gpu(device, "cache_batch_idx"):
        with refused:
            call()
        return
    out = call()
    ks, vs = (oracle.from_dense(x, lengths, rows) for x in (cache_k, cache_v))
    for b in range(4):
        acceptance.check(out[b], None, acceptance.reference(q[b], ks[b], vs[b], Rule(causal=True)))


# --- append -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Append:
    """One call that writes new tokens: the cache's layout, the tables, the mask."""

    layout: str  # "dense", "indexed", "paged"
    rotary: str | None  # "interleaved", "halves"
    rotary_dim: int = D
    rule: Rule = Rule(causal=True)
    packed: bool = False
    dtype: torch.dtype = BF16
    tokens: int = 5
    page_size: int = 8


class Cache:
    """A cache that holds BEFORE tokens and NaN behind them, new tokens, queries, tables."""

    def __init__(self, how: Append):
        gen = torch.Generator().manual_seed(11)
        self.how, batch = how, len(BEFORE)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen).to(how.dtype)

        self.q = normal(batch, how.tokens, HEADS, D)
        self.new_k, self.new_v = (normal(batch, how.tokens, HEADS_KV, D) for _ in range(2))
        angle = torch.rand(CAPACITY + how.tokens + 8, how.rotary_dim // 2, generator=gen) * 6.3
        self.cos, self.sin = angle.cos().to(how.dtype), angle.sin().to(how.dtype)
        self.used = torch.tensor(BEFORE, dtype=torch.int32)
        self.table = self.rows = None
        held = (
            [normal(max(0, n), HEADS_KV, D) for n in BEFORE],
            [normal(max(0, n), HEADS_KV, D) for n in BEFORE],
        )
        self.k, self.v = self._place(held[0], gen), self._place(held[1], gen)

    def _place(self, held: list[torch.Tensor], gen: torch.Generator) -> torch.Tensor:
        how, batch = self.how, len(BEFORE)
        if how.layout == "paged":
            per = math.ceil(CAPACITY / how.page_size)
            if self.table is None:
                order = torch.randperm(batch * per + 3, generator=gen)[: batch * per]
                self.table = order.reshape(batch, per).to(torch.int32)
                self.table[BEFORE.index(-1)] = -1
            pages = self.table.tolist()
            return inputs.fill_pages(held, pages, batch * per + 3, how.page_size)
        if how.layout == "indexed":
            self.rows = torch.tensor([3, 7, 0, 5, 1, 2], dtype=torch.int32)
        rows = range(batch) if self.rows is None else self.rows.tolist()
        store = torch.full((batch + 2, CAPACITY, HEADS_KV, D), math.nan).to(how.dtype)
        if self.rows is None:
            store = store[:batch]
        for row, x in zip(rows, held, strict=True):
            store[row, : len(x)] = x
        return store

    def arguments(self) -> dict:
        how = self.how
        given = {"cache_seqlens": self.used, "causal": how.rule.causal, "return_lse": True}
        given["window_size"] = how.rule.window
        if how.layout == "paged":
            given["block_table"] = self.table
        if how.layout == "indexed":
            given["cache_batch_idx"] = self.rows
        if how.rotary:
            given |= {"rotary_cos": self.cos, "rotary_sin": self.sin}
            given["rotary_interleaved"] = how.rotary == "interleaved"
        if how.packed:
            starts = torch.arange(len(BEFORE) + 1, dtype=torch.int32) * how.tokens
            given |= {"cu_seqlens_q": starts, "cu_seqlens_k_new": starts}
            given["max_seqlen_q"] = how.tokens
        return given

    def expected(self):
        """(k cache, v cache, queries in float64, lengths) after the call."""
        how, queries, keys = self.how, [], []
        for b, n in enumerate(BEFORE):
            q, k = self.q[b].double(), self.new_k[b].double()
            if how.rotary and n >= 0:
                turn = (self.cos, self.sin)
                layout = how.rotary == "interleaved"
                at = oracle.query_positions(n, how.tokens, how.rule)
                q = oracle.rotate(q, *turn, at, layout)
                k = oracle.rotate(k, *turn, list(range(n, n + how.tokens)), layout)
            queries.append(q)
            keys.append(k)
        where = {"page_table": self.table, "batch_idx": self.rows}
        cache_k = oracle.append(self.k, keys, BEFORE, **where)
        cache_v = oracle.append(self.v, list(self.new_v), BEFORE, **where)
        lengths = [0 if n < 0 else n + how.tokens for n in BEFORE]
        return cache_k, cache_v, queries, lengths

    def sequences(self, cache: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        if self.how.layout == "paged":
            return oracle.from_paged(cache, self.table, lengths)
        return oracle.from_dense(cache, lengths, self.rows)


ROTARIES = {
    "plain": {"rotary": None},
    "interleaved": {"rotary": "interleaved"},
    "halves": {"rotary": "halves"},
    "partial": {"rotary": "halves", "rotary_dim": 32},
}
APPENDS = [
    pytest.param(Append(layout=layout, **rotary), id=f"{layout}_{name}")
    for layout in ("dense", "indexed", "paged")
    for name, rotary in ROTARIES.items()
] + [
    pytest.param(Append("paged", "halves", packed=True), id="packed"),
    pytest.param(Append("dense", "interleaved", packed=True), id="packed_dense"),
    pytest.param(Append("paged", "interleaved", rule=Rule()), id="full_mask"),
    pytest.param(Append("paged", "halves", rule=Rule(window=(20, 0))), id="window"),
    pytest.param(Append("paged", "halves", rule=Rule(window=(20, 3))), id="band"),
    pytest.param(Append("paged", "halves", tokens=1, page_size=1), id="decode_page1"),
    pytest.param(Append("paged", "halves", tokens=1, page_size=256), id="decode_page256"),
    pytest.param(Append("dense", "halves", dtype=F32), id="fp32"),
    pytest.param(Append("dense", "halves", dtype=F16), id="fp16"),
]


def same_but_for_one_rounding(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """NaN where nothing was written; elsewhere a neighbour in the dtype, or float32's rounding."""
    assert torch.equal(ours.isnan(), truth.isnan())
    ours, truth = ours.nan_to_num(), truth.nan_to_num()
    slip = torch.finfo(truth.dtype).eps * truth.abs().float()
    error = (ours.float() - truth.float()).abs()
    assert (error <= slip + acceptance.ARITHMETIC * truth.abs().max()).all()


@pytest.mark.parametrize("how", APPENDS)
def test_append_then_attend(fa4, how):
    """New tokens land at cache_seqlens, rotated; nothing else of the cache changes; then attend."""
    cache = Cache(how)
    expected_k, expected_v, queries, lengths = cache.expected()
    q, new_k, new_v = cache.q, cache.new_k, cache.new_v
    if how.packed:
        q, new_k, new_v = (x.flatten(0, 1) for x in (q, new_k, new_v))
    kept = q.clone()
    out, lse = fa4.flash_attn_with_kvcache(q, cache.k, cache.v, new_k, new_v, **cache.arguments())
    assert torch.equal(q, kept)
    same_but_for_one_rounding(cache.k, expected_k)
    assert torch.equal(cache.v.nan_to_num(7.0), expected_v.nan_to_num(7.0))
    ks, vs = (cache.sequences(x, lengths) for x in (cache.k, cache.v))
    for b in range(len(BEFORE)):
        span = slice(b * how.tokens, (b + 1) * how.tokens)
        got, got_lse = (out[span], lse[:, span]) if how.packed else (out[b], lse[b])
        ref = acceptance.reference(queries[b].to(how.dtype), ks[b], vs[b], how.rule, b)
        acceptance.check(got, got_lse, ref, f"sequence {b}")


@pytest.mark.gpu
def test_append_is_refused_on_a_gpu_before_it_writes(fa4, device):
    """Named, and the cache stays as it was."""
    cache = torch.zeros(1, 8, 2, 64, dtype=BF16, device=device)
    new = torch.ones(1, 1, 2, 64, dtype=BF16, device=device)
    with pytest.raises(NotImplementedError, match="k, v"):
        fa4.flash_attn_with_kvcache(new, cache, cache.clone(), new, new, cache_seqlens=0)
    assert (cache == 0).all()


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
