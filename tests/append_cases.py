"""Calls that append to a cache, what they must leave in it, and the oracle's queries and keys."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from . import acceptance, inputs, oracle
from .cases import BF16, F16, F32, Case
from .oracle import Rule

HEADS, HEADS_KV, D = 4, 2, 64
CAPACITY = 96  # tokens a sequence's cache can hold
SPARE_ROWS = 2  # of a cache that cache_batch_idx chooses from
BEFORE = (0, 1, 63, 64, 90, -1)  # tokens already there; -1 is a padded row of a CUDA graph


@dataclass(frozen=True, kw_only=True)
class Append:
    """One call that writes new tokens: the cache's layout, the tables, the mask.

    `before` is what cache_seqlens says; `new` and `queries` are the tokens that each sequence
    brings, packed unless all are equal.
    """

    layout: str  # "dense", "indexed", "paged"
    rotary: str | None  # "interleaved", "halves"
    rotary_dim: int = D
    rule: Rule = Rule(causal=True)
    packed: bool = False
    dtype: torch.dtype = BF16
    before: tuple[int, ...] = BEFORE
    new: tuple[int, ...] = (5,) * len(BEFORE)
    queries: tuple[int, ...] | None = None  # None: as many as new tokens
    page_size: int = 8
    heads: tuple[int, int] = (HEADS, HEADS_KV)
    d: int = D
    d_v: int = D
    strides: str = "contiguous"
    num_splits: int = 0
    fp8: bool = False
    seed: int = 11

    @property
    def batch(self) -> int:
        return len(self.before)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens in the cache after the call."""
        return tuple(0 if n < 0 else n + m for n, m in zip(self.before, self.new, strict=True))

    @property
    def num_queries(self) -> tuple[int, ...]:
        return self.new if self.queries is None else self.queries

    def missing_on_gpu(self) -> str | None:
        """Pattern of what the GPU kernels refuse of such a call, None if they answer it."""
        case = Case(
            name="", layout="paged" if self.layout == "paged" else "dense", dtype=self.dtype,
            d=self.d, d_v=self.d_v, strides=self.strides,
        )  # fmt: skip
        narrow = self.fp8 and (self.d % 16 or self.d_v % 16)
        return "|".join(filter(None, [case.missing_on_gpu(), "dtype" if narrow else None])) or None


class Cache:
    """A cache that holds how.before tokens and NaN behind, new tokens, queries, tables."""

    def __init__(self, how: Append, device: torch.device | str = "cpu"):
        gen = torch.Generator().manual_seed(how.seed)
        self.how, self.device = how, device
        heads, heads_kv = how.heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen).to(device, how.dtype)

        self.qs = [normal(n, heads, how.d) for n in how.num_queries]
        self.new_ks = [normal(n, heads_kv, how.d) for n in how.new]
        self.new_vs = [normal(n, heads_kv, how.d_v) for n in how.new]
        self.capacity = max(CAPACITY, *how.ends)
        longest = self.capacity + max(how.num_queries) + 8
        angle = torch.rand(longest, how.rotary_dim // 2, generator=gen) * 6.3
        self.cos, self.sin = (x.to(device, how.dtype) for x in (angle.cos(), angle.sin()))
        self.used = inputs.int32(how.before, device)
        self.table = self.rows = None
        if how.layout == "paged":
            self.table = self._page_table(gen)
        if how.layout == "indexed":
            order = torch.randperm(how.batch + SPARE_ROWS, generator=gen)
            self.rows = order[: how.batch].to(device, torch.int32)
        self.descales: tuple[Tensor, ...] = ()
        if how.fp8:
            factors = torch.rand(2, how.batch, heads_kv, generator=gen) * 0.02 + 0.005
            self.descales = tuple(factors.to(device))
        held = [[normal(max(0, n), heads_kv, d) for n in how.before] for d in (how.d, how.d_v)]
        if how.fp8:
            held = [inputs.quantised(xs, f) for xs, f in zip(held, self.descales, strict=True)]
        self.k, self.v = (self._place(xs) for xs in held)
        join = inputs.pack if how.packed else inputs.stack
        self.q, self.new_k, self.new_v = (
            join(xs, (), how.dtype, device) for xs in (self.qs, self.new_ks, self.new_vs)
        )
        self._restride()

    def _page_table(self, gen: torch.Generator) -> Tensor:
        """Shuffled pages for the tokens that each sequence will hold; -1 or junk behind them."""
        size = self.how.page_size
        need = [math.ceil(end / size) for end in self.how.ends]
        order = torch.randperm(sum(need) + 3, generator=gen).tolist()
        pages = [[order.pop() for _ in range(n)] for n in need]
        return inputs.page_table(pages, max(need) + 2, torch.device(self.device))

    def _place(self, held: list[Tensor]) -> Tensor:
        how = self.how
        if self.table is not None:
            valid = (self.table >= 0) & (self.table != inputs.JUNK_PAGE)
            pages = [row[ok].tolist() for row, ok in zip(self.table, valid, strict=True)]
            return inputs.fill_pages(held, pages, int(valid.sum()) + 3, how.page_size)
        rows = range(how.batch) if self.rows is None else self.rows.tolist()
        num_rows = how.batch if self.rows is None else how.batch + SPARE_ROWS
        store = inputs.nan_like(held[0], num_rows, self.capacity, *held[0].shape[1:])
        for row, x in zip(rows, held, strict=True):
            store[row, : len(x)] = x
        return store

    def _restride(self) -> None:
        """Put queries, new tokens and cache where how.strides says."""
        place = inputs.PLACEMENTS[self.how.strides]
        self.q, self.new_k, self.new_v = place(self.q, self.new_k, self.new_v)
        _, self.k, self.v = place(self.q, self.k, self.v)

    def arguments(self) -> dict:
        how = self.how
        given = {"cache_seqlens": self.used, "causal": how.rule.causal, "return_lse": True}
        given["window_size"] = how.rule.window
        if self.table is not None:
            given["block_table"] = self.table
        if self.rows is not None:
            given["cache_batch_idx"] = self.rows
        if how.rotary:
            given |= {"rotary_cos": self.cos, "rotary_sin": self.sin}
            given["rotary_interleaved"] = how.rotary == "interleaved"
        if how.packed:
            given["cu_seqlens_q"] = inputs.cumulative(self.qs, self.device)
            given["cu_seqlens_k_new"] = inputs.cumulative(self.new_ks, self.device)
            given["max_seqlen_q"] = max(how.num_queries)
        if how.fp8:
            given |= {"k_descale": self.descales[0], "v_descale": self.descales[1]}
        if how.num_splits:
            given["num_splits"] = how.num_splits
        return given

    def expected(self) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
        """(k cache, v cache, queries in float64, lengths) after the call."""
        how, queries, keys = self.how, [], []
        layout = how.rotary == "interleaved"
        for q, k, n in zip(self.qs, self.new_ks, how.before, strict=True):
            q, k = q.double(), k.double()
            if how.rotary and n >= 0:
                at = oracle.query_positions(n, len(q), how.rule)
                q = oracle.rotate(q, self.cos, self.sin, at, layout)
                k = oracle.rotate(k, self.cos, self.sin, list(range(n, n + len(k))), layout)
            queries.append(q)
            keys.append(k)
        values = self.new_vs
        if how.fp8:
            keys, values = map(inputs.quantised, (keys, values), self.descales)
        where = {"page_table": self.table, "batch_idx": self.rows}
        cache_k = oracle.append(self.k, keys, how.before, **where)
        cache_v = oracle.append(self.v, values, how.before, **where)
        return cache_k, cache_v, queries, list(how.ends)

    def sequences(self, which: int, lengths: Sequence[int]) -> list[Tensor]:
        """The keys (which = 0) or values of each sequence that the cache holds."""
        cache = (self.k, self.v)[which]
        if self.how.fp8:
            cache = cache.float()
        if self.table is not None:
            found = oracle.from_paged(cache, self.table, lengths)
        else:
            found = oracle.from_dense(cache, lengths, self.rows)
        return inputs.dequantised(found, self.descales[which]) if self.how.fp8 else found

    def split_queries(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """x, with the queries of all sequences along `dim` if packed, by sequence."""
        if self.how.packed:
            return list(x.split(self.how.num_queries, dim))
        return list(x)

    def call(self, fa4: ModuleType) -> tuple[Tensor, Tensor]:
        """(out, lse) of the public function."""
        tensors = (self.q, self.k, self.v, self.new_k, self.new_v)
        return fa4.flash_attn_with_kvcache(*tensors, **self.arguments())


def verify(fa4: ModuleType, how: Append, device: torch.device | str) -> None:
    """The cache after the call is as it must be, and the answer is what attending to it gives.

    A call that a GPU refuses must not have written anything.

    Raises:
        NotImplementedError: the call is refused.
        AssertionError: it is answered wrongly.
    """
    cache = Cache(how, device)
    expected_k, expected_v, queries, lengths = cache.expected()
    kept = cache.q.clone(), cache.k.clone(), cache.v.clone()
    try:
        out, lse = cache.call(fa4)
    except NotImplementedError:
        for x, before in zip((cache.q, cache.k, cache.v), kept, strict=True):
            same_bits(x, before)
        raise
    same_bits(cache.q, kept[0])
    same_but_for_one_rounding(cache.k, expected_k)
    (same_but_for_one_rounding if how.fp8 else same_bits)(cache.v, expected_v)
    ks, vs = (cache.sequences(which, lengths) for which in (0, 1))
    outs, lses = cache.split_queries(out), cache.split_queries(lse, 1)
    for b in range(how.batch):
        ref = acceptance.reference(queries[b].to(how.dtype), ks[b], vs[b], how.rule, b)
        acceptance.check(outs[b], lses[b], ref, f"sequence {b}")


ROTARIES = {
    "plain": {"rotary": None},
    "interleaved": {"rotary": "interleaved"},
    "halves": {"rotary": "halves"},
    "partial": {"rotary": "halves", "rotary_dim": 32},
}
RAGGED = {"packed": True, "new": (0, 3, 1, 17, 6, 4), "queries": (2, 3, 0, 9, 6, 1)}


def _appends() -> dict[str, Append]:
    found = {
        f"{layout}_{name}": Append(layout=layout, **rotary)
        for layout in ("dense", "indexed", "paged")
        for name, rotary in ROTARIES.items()
    }
    halves, pairs = {"rotary": "halves"}, {"rotary": "interleaved"}
    one = (1,) * len(BEFORE)
    return found | {
        "packed": Append(layout="paged", packed=True, **halves),
        "packed_dense": Append(layout="dense", packed=True, **pairs),
        "ragged": Append(layout="paged", **halves, **RAGGED),
        "ragged_dense": Append(layout="dense", **pairs, **RAGGED),
        "more_queries": Append(layout="paged", queries=(7,) * len(BEFORE), **halves),
        "full_mask": Append(layout="paged", rule=Rule(), **pairs),
        "window": Append(layout="paged", rule=Rule(window=(20, 0)), **halves),
        "band": Append(layout="paged", rule=Rule(window=(20, 3)), **halves),
        "decode_page1": Append(layout="paged", new=one, page_size=1, **halves),
        "decode_page256": Append(layout="paged", new=one, page_size=256, **halves),
        "heads7": Append(layout="paged", heads=(7, 1), **halves),
        "d128_96": Append(layout="dense", d=128, d_v=96, **pairs),
        "rotary_dim20": Append(layout="dense", rotary_dim=20, **halves),
        "rotary_dim24": Append(layout="paged", rotary_dim=24, **pairs),
        "vllm_cache": Append(layout="paged", strides="interleaved_kv", **halves),
        "transposed": Append(layout="dense", strides="transposed", **pairs),
        "odd_stride": Append(layout="dense", strides="odd_stride", **halves),
        "shifted_by_one": Append(layout="paged", strides="shifted_by_one", **pairs),
        "fp32": Append(layout="dense", dtype=F32, **halves),
        "fp8": Append(layout="paged", fp8=True, **halves),
        "fp8_decode": Append(layout="dense", fp8=True, new=one, **pairs),
        "fp8_plain": Append(layout="indexed", fp8=True, rotary=None),
        "fp8_odd": Append(layout="paged", fp8=True, strides="odd_stride", **pairs),
        "fp16": Append(layout="dense", dtype=F16, **halves),
    }


APPENDS = _appends()
append_params = [pytest.param(how, id=name) for name, how in APPENDS.items()]


def same_but_for_one_rounding(ours: Tensor, truth: Tensor) -> None:
    """NaN where nothing was written; elsewhere a neighbour in the dtype, or float32's rounding."""
    dtype, ours, truth = truth.dtype, ours.float(), truth.float()
    assert ours.shape == truth.shape and torch.equal(ours.isnan(), truth.isnan())
    ours, truth = ours.nan_to_num(), truth.nan_to_num()
    slip = torch.finfo(dtype).eps * truth.abs()
    floor = acceptance.ARITHMETIC * float(truth.abs().max()) if truth.numel() else 0.0
    assert ((ours - truth).abs() <= slip + floor).all()


def same_bits(ours: Tensor, truth: Tensor) -> None:
    """Equal bit for bit, NaN included."""
    ours, truth = ours.float(), truth.float()
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours.nan_to_num(7.0), truth.nan_to_num(7.0))
