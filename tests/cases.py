"""Families of attention calls that once were, or could be, answered wrongly.

A Case is a description: lengths, layout, arguments, what the numbers look like. harness.py turns it
into tensors and judges the answer, on a CPU and on a GPU alike. Comments name the published bug
that a family is there for (FA = Dao-AILab/flash-attention, cfe = NVIDIA/cudnn-frontend, fi =
flashinfer, sgl = sglang, TE = TransformerEngine).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FP8 = torch.float8_e4m3fn
HALF_DTYPES = (F16, BF16)
CORE_HEAD_DIMS = (64, 96, 128)

Window = tuple[int | None, int | None] | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. seqlens_* are the tokens that memory holds, used_* those that count (None = all).

    layout: "dense" (b, s, h, d), all sequences equally long; "varlen", packed; "paged", K and V in
    pages of page_size behind a packed q (paged_dense: behind a dense q); "packed_q", "packed_k":
    one side packed, the other dense.
    fill, strides: see harness.FILLS and harness.PLACEMENTS.
    fp8: K and V are e4m3, with factors for each sequence and head.
    """

    name: str
    seqlens_q: tuple[int, ...] = (97,)
    seqlens_k: tuple[int, ...] = (161,)
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    heads: int = 4
    heads_kv: int = 2
    d: int = 128
    d_v: int | None = None
    dtype: torch.dtype = BF16
    layout: str = "dense"
    page_size: int | None = None
    causal: bool = False
    window: Window = (None, None)
    softcap: float = 0.0
    softmax_scale: float | None = None
    sink: bool = False
    alibi: str | None = None  # "head" (h,) or "batch" (b, h)
    num_splits: int = 1
    pack_gqa: bool | None = None
    dropout_p: float = 0.0
    fill: str = "normal"
    strides: str = "contiguous"
    fp8: bool = False
    return_lse: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def has_dense_q(self) -> bool:
        return self.layout in ("dense", "paged_dense", "packed_k")

    @property
    def has_dense_k(self) -> bool:
        return self.layout in ("dense", "packed_q")

    @property
    def bounds(self) -> tuple[bool, bool]:
        """(has left, has right): which bounds the mask has."""
        left, right = self.window or (None, None)
        return left is not None and left >= 0, self.causal or (right is not None and right >= 0)

    @property
    def kernel_key(self) -> tuple:
        """What one compiled GPU kernel is made for."""
        used = (self.used_q is not None, self.used_k is not None)
        negative = (self.softmax_scale or 0) < 0
        steps = (self.softcap != 0, self.sink, self.alibi is not None, self.dropout_p > 0, negative)
        own = (self.dtype, self.fp8, self.d, self.d_v, self.bounds, self.layout, used)
        own = (*own, self.return_lse, steps)
        box = None if self.page_size is None else math.gcd(self.page_size, 64)
        rows = self.packed_rows > 16 if self.decodes else None
        return (*own, self.num_splits > 1, box, rows)

    @property
    def packed_rows(self) -> int:
        """Query rows that share a key head in the longest sequence."""
        return max(self.seqlens_q, default=0) * self.heads // self.heads_kv

    @property
    def decodes(self) -> bool:
        """Whether the decode kernel of mma.sync answers."""
        widest = max(self.d, self.d_v or self.d)
        few = max(self.seqlens_q, default=0) <= (64 if widest <= 128 else 32)
        return self.dropout_p == 0 and few and self.pack_gqa is not False

    @property
    def has_steps(self) -> bool:
        """Whether the scores are more than scaled dot products, or the softmax more than itself."""
        numbers = self.softcap, self.dropout_p, self.sink, self.alibi
        return any(numbers) or (self.softmax_scale or 0) < 0

    def missing_on_gpu(self) -> str | None:
        """Pattern of the arguments that the GPU kernels refuse, None if they answer this case."""
        reasons = (
            (self.dtype not in HALF_DTYPES, "dtype"),
            (any(n % 8 or n > 256 for n in (self.d, self.d_v or self.d)), "head_dim"),
            (self.fp8 and any(n % 16 for n in (self.d, self.d_v or self.d)), "k.dtype"),
            (self.dropout_p != 0 and self.pack_gqa is True, "together with"),
            (self.layout.startswith("paged") and self.strides in UNALIGNED_STRIDES, "a cache"),
        )
        return "|".join(pattern for applies, pattern in reasons if applies) or None


# --- masks --------------------------------------------------------------------------------------

MASKS: dict[str, dict] = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window": (40, None)},
    "band": {"window": (70, 30)},
}

# TE#3528: an encoding of "no window" once gave zeros. All of these are spelt by real callers.
WINDOW_ENCODINGS: tuple[Window, ...] = (
    None,
    (None, None),
    (-1, -1),
    (None, -1),
    (-1, 0),
    (None, 0),
    (0, 0),
    (0, None),
    (64, 0),
    (64, 64),
    (63, -1),
    (None, 64),
    (-1, 33),
    (5000, 5000),
    (1, 200),
)


def _windows() -> Iterator[Case]:
    for causal, window in product((False, True), WINDOW_ENCODINGS):
        text = "none" if window is None else f"{window[0]}_{window[1]}"
        name = f"window_{text}{'_causal' if causal else ''}"
        yield Case(name=name, causal=causal, window=window, seqlens_q=(150,), seqlens_k=(201,))


# --- lengths ------------------------------------------------------------------------------------


def _core() -> Iterator[Case]:
    """Every dtype, head dimension and kind of mask once."""
    for dtype, d, (mask, args) in product((F32, F16, BF16), CORE_HEAD_DIMS, MASKS.items()):
        name = f"core_{str(dtype)[6:]}_d{d}_{mask}"
        yield Case(name=name, dtype=dtype, d=d, seqlens_q=(200,) * 2, seqlens_k=(333,) * 2, **args)


def _query_boundaries() -> Iterator[Case]:
    """FA#2091, #2301: one row more or less than a tile, with and without as many keys."""
    for causal, sq in product((False, True), (1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 513)):
        for sk in dict.fromkeys((sq, 300)):
            name = f"sq{sq}_sk{sk}{'_causal' if causal else ''}"
            yield Case(
                name=name, seqlens_q=(sq,), seqlens_k=(sk,), causal=causal, heads=3, heads_kv=1
            )


def _key_boundaries() -> Iterator[Case]:
    """Keys around multiples of every tile, 1 to 13 blocks: rings of 2 to 6 stages wrap twice."""
    for causal, d in ((False, 128), (True, 128), (False, 64)):
        for blocks, slip in product((1, 2, 3, 4, 5, 7, 13), (-1, 0, 1)):
            sk = 64 * blocks + slip
            name = f"d{d}_sk{sk}{'_causal' if causal else ''}"
            yield Case(
                name=name, d=d, seqlens_q=(33,), seqlens_k=(sk,), causal=causal, heads=2, heads_kv=1
            )
    for sk in (1, 2, 7, 8, 15, 16, 17):
        yield Case(name=f"d128_sk{sk}", seqlens_q=(33,), seqlens_k=(sk,), heads=2)


def _unequal_causal() -> Iterator[Case]:
    """Causal with sq != sk, both ways: rows without any key where there are more queries."""
    for sq, sk in ((300, 40), (40, 300), (257, 256), (1, 500), (500, 1), (129, 128), (700, 699)):
        yield Case(name=f"causal_{sq}x{sk}", seqlens_q=(sq,), seqlens_k=(sk,), causal=True)
        yield Case(name=f"band_{sq}x{sk}", seqlens_q=(sq,), seqlens_k=(sk,), window=(20, 5))


def _ratios() -> Iterator[Case]:
    """FA#2504, #2258: packed GQA where the tile is no multiple of the ratio."""
    for ratio in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12):
        kv = 2 if ratio < 8 else 1
        for causal in (False, True):
            name = f"gqa{ratio}{'_causal' if causal else ''}"
            yield Case(
                name=name, heads=ratio * kv, heads_kv=kv, seqlens_q=(65,) * 2, seqlens_k=(130,) * 2,
                causal=causal,
            )  # fmt: skip
        yield Case(
            name=f"gqa{ratio}_decode", heads=ratio * kv, heads_kv=kv, seqlens_q=(1,) * 3,
            seqlens_k=(190,) * 3, causal=True,
        )  # fmt: skip
    yield Case(name="mqa", heads=16, heads_kv=1, seqlens_q=(40,), seqlens_k=(90,))


def _fills() -> Iterator[Case]:
    """FACTS' rule sees normal inputs only; these are the others."""
    fills = ("normal", "peaked", "outlier", "constant", "zeros", "shifted", "large_v")
    for fill, dtype, (mask, args) in product(fills, (F32, BF16, F16), MASKS.items()):
        name = f"{fill}_{str(dtype)[6:]}_{mask}"
        yield Case(name=name, fill=fill, dtype=dtype, seqlens_k=(333,), seqlens_q=(140,), **args)


def _empty() -> Iterator[Case]:
    """FA#2470, #2515: nothing to do is a legal call: out = 0, LSE = -inf."""
    for layout in ("dense", "varlen"):
        yield Case(name=f"{layout}_sk0", layout=layout, seqlens_q=(5, 5), seqlens_k=(0, 0))
        yield Case(name=f"{layout}_sq0", layout=layout, seqlens_q=(0, 0), seqlens_k=(7, 7))
        yield Case(name=f"{layout}_b0", layout=layout, seqlens_q=(), seqlens_k=())
        yield Case(
            name=f"{layout}_all0", layout=layout, seqlens_q=(0,), seqlens_k=(0,), causal=True
        )


# --- varlen and seqused -------------------------------------------------------------------------

# cfe#575: zero-length sequences between long ones.
VARLEN_LENGTHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one": ((130,), (130,)),
    "ragged": ((1, 127, 40, 300), (64, 200, 40, 310)),
    "interleaved_zeros": ((5, 0, 300, 0, 0, 1, 129), (0, 7, 310, 64, 0, 65, 0)),
    "zeros_at_both_ends": ((0, 60, 0), (0, 60, 0)),
    "more_queries_than_keys": ((90, 1, 258), (30, 1, 257)),
    "decode": ((1,) * 9, (1, 2, 63, 64, 65, 127, 128, 129, 300)),
    "many_short": (tuple(range(1, 24)), tuple(range(23, 0, -1))),
}


def _varlen() -> Iterator[Case]:
    for (lengths, (sq, sk)), (mask, args) in product(VARLEN_LENGTHS.items(), MASKS.items()):
        yield Case(
            name=f"varlen_{lengths}_{mask}", layout="varlen", seqlens_q=sq, seqlens_k=sk, **args
        )
    # FA#2760, FA#2761: more splits than there are blocks of keys, sequence by sequence
    for lengths, splits in product(("interleaved_zeros", "decode"), (2, 5, 256)):
        sq, sk = VARLEN_LENGTHS[lengths]
        name = f"varlen_{lengths}_splits{splits}"
        yield Case(
            name=name, layout="varlen", seqlens_q=sq, seqlens_k=sk, num_splits=splits, causal=True
        )
    for dtype, d in ((F16, 64), (BF16, 96), (F32, 64)):
        sq, sk = VARLEN_LENGTHS["interleaved_zeros"]
        name = f"varlen_{str(dtype)[6:]}_d{d}"
        yield Case(
            name=name, layout="varlen", seqlens_q=sq, seqlens_k=sk, dtype=dtype, d=d, causal=True
        )


def _used() -> Iterator[Case]:
    """Memory past what is used is NaN: it must never reach a result, not even times zero."""
    sq, sk = (130, 130, 130, 130), (300, 300, 300, 300)
    used_q, used_k = (130, 1, 0, 77), (299, 300, 64, 0)
    for layout, (mask, args) in product(("dense", "varlen"), MASKS.items()):
        base = Case(name="", layout=layout, seqlens_q=sq, seqlens_k=sk, **args)
        yield replace(base, name=f"{layout}_seqused_k_{mask}", used_k=used_k)
        if mask == "causal":
            yield replace(base, name=f"{layout}_seqused_q_{mask}", used_q=used_q)
            yield replace(base, name=f"{layout}_both_{mask}", used_q=used_q, used_k=used_k)


# --- layouts in memory --------------------------------------------------------------------------

# FA#2665, #2670, #2745: strides and alignment ignored.
ALIGNED_STRIDES = ("contiguous", "transposed", "padded", "interleaved_kv", "packed_qkv", "sliced")
UNALIGNED_STRIDES = ("shifted_by_one", "odd_stride", "expanded_batch", "expanded_heads")


def _strides() -> Iterator[Case]:
    for strides in ALIGNED_STRIDES + UNALIGNED_STRIDES:
        sk = 140 if strides == "packed_qkv" else 200
        for layout, (mask, args) in product(("dense", "varlen"), MASKS.items()):
            if mask in ("left", "band") or (strides == "expanded_batch" and layout == "varlen"):
                continue
            yield Case(
                name=f"{strides}_{layout}_{mask}", strides=strides, layout=layout,
                seqlens_q=(140, 140), seqlens_k=(sk, sk), **args,
            )  # fmt: skip


def _pages() -> Iterator[Case]:
    """FA#2303, #2368, fi#4347, sgl#35757: shuffled tables, garbage entries, partial last pages."""
    lengths = (1, 0, 65, 256, 300)
    for size, layout in product((1, 3, 8, 16, 32, 64, 128, 256), ("paged", "paged_dense")):
        sq = (3,) * 5 if layout == "paged_dense" else (1, 4, 65, 130, 0)
        base = Case(
            name="", layout=layout, page_size=size, seqlens_q=sq, seqlens_k=(320,) * 5,
            used_k=lengths, d=64,
        )  # fmt: skip
        yield replace(base, name=f"{layout}_page{size}_causal", causal=True)
        if size in (3, 16):
            yield replace(base, name=f"{layout}_page{size}_full")
            yield replace(base, name=f"{layout}_page{size}_band", window=(40, 3))
            yield replace(base, name=f"{layout}_page{size}_splits", num_splits=7, causal=True)
            yield replace(
                base, name=f"{layout}_page{size}_interleaved_kv", strides="interleaved_kv"
            )


def _decode() -> Iterator[Case]:
    """Few queries against many keys; 0 splits: the plan decides for the card."""
    for splits, (mask, args) in product((0, 3), MASKS.items()):
        for sq in (1, 5):
            yield Case(
                name=f"sq{sq}_{mask}_splits{splits}", seqlens_q=(sq,) * 2, seqlens_k=(1500,) * 2,
                num_splits=splits, **args,
            )  # fmt: skip
    # Groups of 1 to 128 heads; 16, 17, 32 and 33 packed rows; row tiles beyond the first.
    for heads, heads_kv, sq in (
        (2, 2, 1), (7, 1, 2), (16, 1, 1), (17, 1, 1), (32, 8, 8), (33, 1, 1), (128, 1, 1),
    ):  # fmt: skip
        yield Case(
            name=f"h{heads}_{heads_kv}_sq{sq}", heads=heads, heads_kv=heads_kv, seqlens_q=(sq,),
            seqlens_k=(700,), num_splits=0, causal=True,
        )  # fmt: skip
    for d, d_v in ((40, 40), (64, 64), (96, 96), (192, 128), (256, 256)):
        for dtype in HALF_DTYPES:
            yield Case(
                name=f"d{d}_{d_v}_{str(dtype)[6:]}", d=d, d_v=d_v, dtype=dtype, seqlens_q=(2,),
                seqlens_k=(3000,), num_splits=0, causal=True,
            )  # fmt: skip
    # A key of -inf must not meet the zeros that widen the query to the tile of the values.
    for d, d_v in ((32, 192), (64, 128)):
        yield Case(
            name=f"narrow_keys{d}_{d_v}_minus_inf", d=d, d_v=d_v, fill="minus_inf", seqlens_q=(1,),
            seqlens_k=(130,), num_splits=1,
        )  # fmt: skip
    yield Case(
        name="many_low_scores", d=160, dtype=F16, layout="packed_k", heads=1, heads_kv=1,
        fill="shifted", softmax_scale=0.01, seqlens_q=(1,), seqlens_k=(100,), num_splits=0,
    )  # fmt: skip
    ragged = (1, 9000, 0, 64, 65, 300, 5000)
    for splits in (0, 64):
        yield Case(
            name=f"ragged_splits{splits}", layout="varlen", seqlens_q=(1,) * 7, seqlens_k=ragged,
            num_splits=splits, causal=True,
        )  # fmt: skip
        yield Case(
            name=f"cache_splits{splits}", seqlens_q=(1,) * 7, seqlens_k=(9000,) * 7, used_k=ragged,
            layout="varlen", num_splits=splits, causal=True,
        )  # fmt: skip
    for size in (16, 128):
        yield Case(
            name=f"page{size}", layout="paged_dense", page_size=size, seqlens_q=(1,) * 7,
            seqlens_k=(9000,) * 7, used_k=ragged, num_splits=0, causal=True,
        )  # fmt: skip


def _chunks() -> Iterator[Case]:
    """Many queries against pages or split keys, as chunked prefill asks: the forward kernel's."""
    sq, used = (130, 1, 300, 0, 65), (300, 1, 320, 0, 256)
    for size, splits in ((1, 1), (16, 3), (24, 0), (64, 7), (128, 1), (256, 2)):
        yield Case(
            name=f"page{size}_splits{splits}", layout="paged", page_size=size, seqlens_q=sq,
            seqlens_k=(320,) * 5, used_k=used, num_splits=splits, causal=True, d=64,
        )  # fmt: skip
    for d, d_v in ((40, 40), (96, 96), (128, 128), (192, 128), (256, 256)):
        yield Case(
            name=f"d{d}_{d_v}", layout="paged", page_size=16, seqlens_q=(140, 90), d=d, d_v=d_v,
            seqlens_k=(200,) * 2, used_k=(200, 99), num_splits=2, window=(70, 0),
        )  # fmt: skip
    for splits, (mask, args) in product((0, 3, 256), MASKS.items()):
        name = f"dense_{mask}_splits{splits}"
        yield Case(name=name, seqlens_q=(300,), seqlens_k=(900,), num_splits=splits, **args)
    extras = {"softcap": 15.0, "sink": True, "alibi": "batch"}
    heads = {"heads": 2, "heads_kv": 1, "d": 64}
    lengths = {"seqlens_q": (70,) * 2, "seqlens_k": (200,) * 2, "causal": True, **heads}
    yield Case(name="splits_steps", num_splits=3, **lengths, **extras)
    yield Case(name="splits_dropout", num_splits=3, dropout_p=0.3, **lengths)
    paged = {"layout": "paged", "page_size": 16, "used_k": (200, 40)}
    yield Case(name="pages_steps", num_splits=2, **paged, **lengths, **extras)
    yield Case(name="pages_dropout", num_splits=0, dropout_p=0.3, **paged, **lengths)
    few = {"seqlens_q": (1,) * 2, "seqlens_k": (200,) * 2, "causal": True, **heads}
    yield Case(name="pages_dropout_decode", num_splits=2, dropout_p=0.3, **paged, **few)


def _fp8() -> Iterator[Case]:
    """The same from e4m3: every layout, width of tile and step of the scores."""
    sq, used = (130, 1, 300, 0, 65), (300, 1, 320, 0, 256)
    for size, splits, d in ((1, 1, 64), (5, 2, 64), (16, 3, 128), (64, 7, 64), (256, 1, 128)):
        yield Case(
            name=f"fp8_page{size}_splits{splits}", layout="paged", page_size=size, seqlens_q=sq,
            seqlens_k=(320,) * 5, used_k=used, num_splits=splits, causal=True, d=d, fp8=True,
        )  # fmt: skip
    for turn, (d, d_v) in enumerate(((48, 48), (64, 64), (80, 96), (128, 128), (192, 128))):
        for layout in ("dense", "varlen"):
            yield Case(
                name=f"fp8_d{d}_{d_v}_{layout}", layout=layout, seqlens_q=(150, 150), d=d, d_v=d_v,
                seqlens_k=(261,) * 2, used_k=(261, 99), window=(120, 0), fp8=True,
                dtype=HALF_DTYPES[(turn + len(layout)) % 2],
            )  # fmt: skip
    for d, d_v in ((160, 160), (256, 256), (64, 256)):
        yield Case(
            name=f"fp8_d{d}_{d_v}", seqlens_q=(150,), seqlens_k=(261,), d=d, d_v=d_v, fp8=True,
            heads=2, heads_kv=1, num_splits=2,
        )  # fmt: skip
    plain = {"seqlens_q": (70,) * 2, "seqlens_k": (200,) * 2, "causal": True, "fp8": True}
    extras = {"softcap": 15.0, "sink": True, "alibi": "batch"}
    for d, splits in ((64, 1), (128, 3)):
        yield Case(name=f"fp8_steps_splits{splits}", num_splits=splits, d=d, **plain, **extras)
    yield Case(name="fp8_dropout", d=64, dropout_p=0.3, used_k=(200, 40), **plain)
    yield Case(name="fp8_negative", d=64, softmax_scale=-0.1, **plain)
    for fill, dtype in (("peaked", BF16), ("outlier", F16), ("large_v", BF16), ("zeros", F16)):
        yield Case(name=f"fp8_{fill}", fill=fill, dtype=dtype, num_splits=2, **plain)
    for strides in ("interleaved_kv", "odd_stride", "transposed", "expanded_heads"):
        yield Case(name=f"fp8_{strides}", strides=strides, d=64, **plain)


# --- everything that is not in every kernel -------------------------------------------------------


def _features() -> Iterator[Case]:
    """Arguments and head dimensions, alone and together."""
    for d in (8, 20, 32, 40, 64, 72, 80, 112, 128, 160, 192, 256):
        yield Case(name=f"head_dim{d}", d=d, causal=True)
    for d, d_v in ((192, 128), (64, 128), (64, 512), (128, 8), (96, 40), (200, 256)):
        yield Case(name=f"head_dim{d}_{d_v}", d=d, d_v=d_v, causal=True)
    extras: dict[str, dict] = {
        "softcap": {"softcap": 20.0},
        "small_softcap": {"softcap": 0.5},
        "sink": {"sink": True},
        "alibi": {"alibi": "head"},
        "alibi_batch": {"alibi": "batch"},
        "scale": {"softmax_scale": 0.3},
        "zero_scale": {"softmax_scale": 0.0},
        "negative_scale": {"softmax_scale": -0.1},
        "all": {"softcap": 15.0, "sink": True, "alibi": "batch", "softmax_scale": 0.2, "d_v": 32},
    }
    for (name, args), (mask, limits), dtype in product(extras.items(), MASKS.items(), (F32, BF16)):
        yield Case(
            name=f"{name}_{mask}_{str(dtype)[6:]}", dtype=dtype, d=64, seqlens_q=(90, 90),
            seqlens_k=(70, 70), **limits, **args,
        )  # fmt: skip
    for splits in (2, 3, 7, 32):
        yield Case(name=f"splits{splits}", num_splits=splits, seqlens_q=(3,), causal=True)


CORE = tuple(_core())
WINDOWS = tuple(_windows())
QUERY_BOUNDARIES = tuple(_query_boundaries())
KEY_BOUNDARIES = tuple(_key_boundaries())
UNEQUAL_CAUSAL = tuple(_unequal_causal())
RATIOS = tuple(_ratios())
FILLS = tuple(_fills())
EMPTY = tuple(_empty())
VARLEN = tuple(_varlen())
USED = tuple(_used())
STRIDES = tuple(_strides())
PAGES = tuple(_pages())
DECODE = tuple(_decode())
CHUNKS = tuple(_chunks())
FP8_CHUNKS = tuple(_fp8())
FEATURES = tuple(_features())

FAMILIES = {
    "core": CORE,
    "windows": WINDOWS,
    "query_boundaries": QUERY_BOUNDARIES,
    "key_boundaries": KEY_BOUNDARIES,
    "unequal_causal": UNEQUAL_CAUSAL,
    "ratios": RATIOS,
    "fills": FILLS,
    "empty": EMPTY,
    "varlen": VARLEN,
    "used": USED,
    "strides": STRIDES,
    "pages": PAGES,
    "decode": DECODE,
    "chunks": CHUNKS,
    "fp8_chunks": FP8_CHUNKS,
    "features": FEATURES,
}
