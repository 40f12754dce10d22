"""What the fuzzer tries: a few kernels a run, and for each of them many calls.

Compiling takes seconds, so whatever a compiled kernel may depend on is a `Kernel`, drawn from a
seed into a pool; lengths, values, strides and run-time arguments are drawn by hypothesis, case by
case, and shrink toward one short sequence of one head.
"""

import math
import random
from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st

from ..append_cases import Append
from ..cases import ALIGNED_STRIDES, BF16, F16, F32, UNALIGNED_STRIDES, Case
from ..inputs import FILLS
from ..oracle import Rule
from .merges import Merge

PAGE_SIZES = (1, 3, 8, 16, 32, 64, 128, 256)
RATIOS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
LEFTS = (0, 1, 5, 40, 63, 64, 65, 200, 5000)
TILES = (16, 32, 48, 64, 80, 96, 128, 192, 256, 512)
BOUNDARIES = tuple(sorted({n + slip for n in (0, 8, *TILES) for slip in (-1, 0, 1)} - {-1}))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a case may become: a back end's speed."""

    pairs: int  # of queries and keys, over all heads
    length: int
    rows: int  # sequences times query heads
    splits: tuple[int, ...] = (2, 3, 7, 256)  # numbers of splits, where keys are split


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a compiled kernel may depend on. Where all is default, the plainest one."""

    dtype: torch.dtype = BF16
    d: int = 64
    d_v: int | None = None
    layout: str = "dense"
    page_size: int | None = None
    has_left: bool = False
    has_right: bool = False
    softcap: bool = False
    sink: bool = False
    alibi: str | None = None
    used_q: bool = False
    used_k: bool = False
    return_lse: bool = True
    negative_scale: bool = False
    aligned: bool = True
    splits: bool = False
    pack_gqa: bool | None = None
    dropout: bool = False
    append: bool = False
    rotary: str | None = None
    rotary_dim: int = 0
    fp8: bool = False
    merge: bool = False

    @property
    def features(self) -> int:
        """In how many ways it is not the plainest: failures shrink toward few."""
        return sum(getattr(self, f.name) != f.default for f in fields(self))


# --- kernels --------------------------------------------------------------------------------------


def draw_kernel(rng: random.Random) -> Kernel:
    """One kernel. Each feature is rare enough that most kernels have few."""

    def rarely(share: float = 0.15) -> bool:
        return rng.random() < share

    d = rng.choice((64, 96, 128)) if rarely(0.6) else 8 * rng.randint(1, 32)
    common = {
        "dtype": F32 if rarely(0.03) else rng.choice((BF16, F16)),
        "d": d,
        "d_v": 8 * rng.randint(1, 32) if rarely() else None,
        "has_left": rarely(0.3),
        "has_right": rarely(0.6),
        "aligned": not rarely(),
        "splits": rarely(0.25),
    }
    if rarely(0.08):
        return Kernel(
            merge=True, splits=rarely(0.5), **{k: common[k] for k in ("dtype", "d", "aligned")}
        )
    if rarely(0.25):
        rotary = rng.choice((None, "interleaved", "halves"))
        half = d // 2 if rarely(0.5) else rng.randint(1, d // 2)
        layout = rng.choice(("dense", "indexed", "paged"))
        return Kernel(
            append=True,
            layout=layout,
            page_size=rng.choice(PAGE_SIZES) if layout == "paged" else None,
            rotary=rotary,
            rotary_dim=2 * half if rotary else 0,
            fp8=rarely(),
            **common,
        )
    layout = rng.choice(
        ("dense", "dense", "varlen", "paged", "paged_dense", "packed_q", "packed_k")
    )
    paged = layout.startswith("paged")
    return Kernel(
        layout=layout,
        page_size=rng.choice(PAGE_SIZES) if paged else None,
        softcap=rarely(),
        sink=rarely(),
        alibi=rng.choice(("head", "batch")) if rarely() else None,
        used_q=rarely() and layout != "paged_dense",
        used_k=rarely(0.3),
        return_lse=not rarely(0.3),
        negative_scale=rarely(0.05),
        pack_gqa=rng.choice((True, False)) if rarely(0.3) else None,
        dropout=rarely(0.1) and layout != "paged_dense",
        fp8=rarely(),
        **common,
    )


def draw_pool(seed: int, size: int) -> tuple[Kernel, ...]:
    """`size` different kernels, the plainest first."""
    rng, pool = random.Random(seed), set()
    while len(pool) < size:
        pool.add(draw_kernel(rng))
    return tuple(sorted(pool, key=lambda kernel: (kernel.features, repr(kernel))))


# --- calls ----------------------------------------------------------------------------------------


def lengths(most: int) -> st.SearchStrategy[int]:
    """0 .. most, half of them beside a tile's boundary; they shrink to any number."""
    near = [n for n in BOUNDARIES if n <= most]

    def snapped(drawn: tuple[bool, int]) -> int:
        snap, n = drawn
        return min(near, key=lambda boundary: abs(boundary - n)) if snap else n

    return st.tuples(st.booleans(), st.integers(0, most)).map(snapped)


def sequence_lengths(draw, batch: int, most: int, equal: bool) -> tuple[int, ...]:
    if equal:
        return (draw(lengths(most)),) * batch
    return tuple(draw(lengths(most)) for _ in range(batch))


def used(draw, counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(draw(st.integers(-1, n)) for n in counts)


def mask(draw, kernel: Kernel) -> tuple[bool, tuple[int | None, int | None] | None]:
    """(causal, window_size), in one of the encodings that callers use."""
    unbounded = st.sampled_from((None, -1))
    left = draw(st.sampled_from(LEFTS)) if kernel.has_left else draw(unbounded)
    if not kernel.has_right:
        right = draw(unbounded)
        bare = left is None and right is None and draw(st.booleans())
        return False, None if bare else (left, right)
    if draw(st.booleans()):
        return True, (left, draw(unbounded | st.sampled_from((0, 3, 5000))))
    return False, (left, draw(st.sampled_from((0, 1, 3, 30, 64, 5000))))


def heads(draw, limits: Limits) -> tuple[int, int]:
    """(query heads, key heads)."""
    ratio = draw(st.sampled_from([r for r in RATIOS if r <= limits.rows]))
    heads_kv = draw(st.integers(1, max(1, min(3, limits.rows // ratio))))
    return ratio * heads_kv, heads_kv


@st.composite
def cases(draw, pool: tuple[Kernel, ...], limits: Limits) -> Case | Append | Merge:
    """One call of one of the kernels of the pool."""
    kernel = draw(st.sampled_from(pool))
    seed = draw(st.integers(0, 2**16))
    if kernel.merge:
        return merge_call(draw, kernel, limits, seed)
    num_heads, heads_kv = heads(draw, limits)
    most = max(1, min(4, limits.rows // num_heads))
    paged_or_append = kernel.append or kernel.layout.startswith("paged")
    batch = draw(st.integers(1, most) if paged_or_append else st.integers(0, most))
    build = append_call if kernel.append else plain_call
    return build(draw, kernel, limits, (num_heads, heads_kv), batch, seed)


def plain_call(draw, kernel: Kernel, limits: Limits, num_heads, batch: int, seed: int) -> Case:
    pairs = limits.pairs // max(1, batch * num_heads[0])
    dense_q = kernel.layout in ("dense", "paged_dense", "packed_k")
    dense_k = kernel.layout in ("dense", "packed_q")
    seqlens_q = sequence_lengths(draw, batch, min(limits.length, math.isqrt(pairs)), dense_q)
    most_keys = min(limits.length, pairs // max(1, *seqlens_q, 1))
    strides = draw(st.sampled_from(placements(kernel)))
    if strides == "packed_qkv":
        seqlens_k = seqlens_q
    else:
        seqlens_k = sequence_lengths(draw, batch, most_keys, dense_k)
    causal, window = mask(draw, kernel)
    scale = -0.1 if kernel.negative_scale else draw(st.sampled_from((None, 0.3, 0.01, 0.0)))
    fills = [f for f in FILLS if f != "minus_inf" or (scale is None or scale > 0)]
    return Case(
        name=f"fuzz{seed}",
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        used_q=used(draw, seqlens_q) if kernel.used_q else None,
        used_k=used(draw, seqlens_k) if kernel.used_k else None,
        heads=num_heads[0],
        heads_kv=num_heads[1],
        d=kernel.d,
        d_v=kernel.d_v,
        dtype=kernel.dtype,
        layout=kernel.layout,
        page_size=kernel.page_size,
        causal=causal,
        window=window,
        softcap=draw(st.sampled_from((15.0, 0.5, 50.0))) if kernel.softcap else 0.0,
        softmax_scale=scale,
        sink=kernel.sink,
        alibi=kernel.alibi,
        num_splits=draw(st.sampled_from(limits.splits if kernel.splits else (0, 1))),
        pack_gqa=kernel.pack_gqa,
        dropout_p=draw(st.sampled_from((0.1, 0.5))) if kernel.dropout else 0.0,
        fill=draw(st.sampled_from(fills)),
        strides=strides,
        fp8=kernel.fp8,
        return_lse=kernel.return_lse,
    )


def merge_call(draw, kernel: Kernel, limits: Limits, seed: int) -> Merge:
    """A stack of parts if the kernel `splits`, else a pair."""
    return Merge(
        parts=draw(st.integers(1, max(limits.splits))) if kernel.splits else 2,
        batch=draw(st.none() | st.integers(1, 3)),
        length=draw(st.integers(1, 20)),
        heads=draw(st.integers(1, 3)),
        d=kernel.d,
        dtype=kernel.dtype,
        out_dtype=draw(st.sampled_from((None, F32, F16, BF16))),
        pair=not kernel.splits,
        aligned=kernel.aligned,
        empty=draw(st.sampled_from((0.0, 0.4, 1.0))),
        seed=seed,
    )


def placements(kernel: Kernel) -> list[str]:
    """Where q, k and v of such a call may lie in memory; see inputs.PLACEMENTS."""
    found = list(ALIGNED_STRIDES if kernel.aligned else UNALIGNED_STRIDES)
    same_dims = kernel.d_v in (None, kernel.d)
    together = kernel.layout in ("dense", "varlen") and same_dims and not kernel.fp8
    if "packed_qkv" in found and not together:
        found.remove("packed_qkv")
    # Sequences that share their tokens must be equally long, padding included.
    if "expanded_batch" in found and (kernel.layout != "dense" or kernel.used_k):
        found.remove("expanded_batch")
    return found


def append_call(draw, kernel: Kernel, limits: Limits, num_heads, batch: int, seed: int) -> Append:
    packed = draw(st.booleans())
    most_new = min(40, limits.length)
    new = sequence_lengths(draw, batch, most_new, not packed)
    queries = draw(st.none() | st.just("own"))
    if queries is not None:
        queries = sequence_lengths(draw, batch, most_new, not packed)
    causal, window = mask(draw, kernel)
    choices = ("contiguous", "transposed", "padded", "interleaved_kv")
    return Append(
        layout=kernel.layout,
        rotary=kernel.rotary,
        rotary_dim=kernel.rotary_dim or 2,
        rule=Rule(causal=causal, window=window),
        packed=packed,
        dtype=kernel.dtype,
        before=tuple(draw(st.integers(-1, limits.length)) for _ in range(batch)),
        new=new,
        queries=queries,
        page_size=kernel.page_size or 8,
        heads=num_heads,
        d=kernel.d,
        d_v=kernel.d_v or kernel.d,
        strides=draw(st.sampled_from(choices if kernel.aligned else ("odd_stride",))),
        num_splits=draw(st.sampled_from(limits.splits if kernel.splits else (0, 1))),
        fp8=kernel.fp8,
        seed=seed,
    )
