"""Which kernels are precompiled: those that answer what transformers and serving engines ask.

The rows below are calls, not kernels: the plan says which kernel answers each, on each card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ..append_plan import AppendKey
from ..combine_plan import CombineKey
from ..compiler import with_target
from ..device import VARIANTS, Card
from ..mask_rule import FULL, Band
from ..plan import plan_on
from ..problem import AttentionProblem, Layout

BF16, FP16 = torch.bfloat16, torch.float16
DENSE, VARLEN, PAGED = Layout.DENSE, Layout.VARLEN, Layout.PAGED
CAUSAL, WINDOW = Band(None, 0), Band(127, 0)
ANY = (CAUSAL,)  # the decode kernel has both bounds whatever it is asked for
NUM_SMS = 132  # splits are asked for by number; CTAs are few or many on any card
HEADS = 32
# Query heads to a key head in current models, the most frequent first. Only the tcgen05 kernels are
# compiled for it, where heads share tiles.
RATIOS = {64: (8, 4), 96: (1,), 128: (4, 8), 192: (1,), 256: (2, 8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Calls of one kind: every combination of what is listed.

    `dims` are (head_dim, head_dim_v), `layouts` (of queries, of keys, tokens a page or None).
    `queries` are tokens of the longest sequence; `fixed` are further fields of AttentionProblem.
    Query heads to a key head are those of RATIOS, up to `num_ratios` of them.
    """

    what: str
    dims: tuple[tuple[int, int], ...]
    masks: tuple[Any, ...]
    layouts: tuple[tuple[Layout, Layout, int | None], ...]
    dtypes: tuple[torch.dtype, ...] = (BF16,)
    queries: tuple[int, ...] = (4096,)
    splits: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (2,)
    fixed: tuple[tuple[str, Any], ...] = ()
    num_ratios: int = 1

    def problems(self) -> Iterator[AttentionProblem]:
        """The calls as the planner sees them."""
        ratios = range(self.num_ratios)
        choices = (self.dims, self.masks, self.layouts, self.dtypes, self.queries, self.splits)
        for dims, mask, layout, dtype, queries, splits, batch, ratio in product(
            *choices, self.batches, ratios
        ):
            used = layout[1] is PAGED
            heads_kv = HEADS // RATIOS[dims[0]][ratio % len(RATIOS[dims[0]])]
            yield AttentionProblem(
                **_COMMON
                | {
                    "batch": batch,
                    "num_heads_kv": heads_kv,
                    "head_dim": dims[0],
                    "head_dim_v": dims[1],
                    "softmax_scale": dims[0] ** -0.5,
                    "mask": mask,
                    "q_layout": layout[0],
                    "kv_layout": layout[1],
                    "page_size": layout[2],
                    "dtype": dtype,
                    "seqlen_q": queries,
                    "num_splits": splits,
                    "has_seqused_k": used,
                }
                | dict(self.fixed)
            )


_COMMON: dict[str, Any] = {
    "device": torch.device("cuda", 0),
    "seqlen_k": 4096,
    "num_heads": HEADS,
    "softcap": 0.0,
    "has_seqused_q": False,
    "has_kv_batch_idx": False,
    "has_sink": False,
    "has_alibi": False,
    "score_mod": None,
    "dropout_p": 0.0,
    "deterministic": False,
    "pack_gqa": None,
    "return_lse": False,
    "requires_grad": False,
}
PACKED = ((DENSE, DENSE, None), (VARLEN, VARLEN, None))
# Of the decode kernel: up to 16 packed rows and more, whole keys and split ones, few CTAs and many.
FEW, SPLIT, BATCHES = (1, 8), (1, 4), (2, 64)
SINK = (("has_sink", True), ("sink_dtype", BF16))
FP8_CACHE = (("fp8_kv", True), ("has_k_descale", True), ("has_v_descale", True))
SHIPPED: tuple[Calls, ...] = (
    Calls(
        what="prefill, dense and packed",
        dims=((64, 64), (96, 96), (128, 128), (256, 256)),
        masks=(FULL, CAUSAL, WINDOW),
        layouts=PACKED,
        num_ratios=2,
    ),
    Calls(
        what="dense prefill of short prompts, where CTAs of B200 and B300 do not work in pairs",
        dims=((64, 64), (96, 96), (128, 128), (192, 128)),
        masks=(FULL,),
        layouts=((DENSE, DENSE, None),),
        queries=(130,),
    ),
    Calls(
        what="causal prefill of up to 4095 tokens (192: 2047), dense, where they do not either",
        dims=((128, 128), (192, 128)),
        masks=(CAUSAL,),
        layouts=((DENSE, DENSE, None),),
        queries=(1024,),
        fixed=(("seqlen_k", 1024),),
        num_ratios=2,
    ),
    Calls(
        what="the same with LSE",
        dims=((128, 128),),
        masks=(CAUSAL,),
        layouts=((DENSE, DENSE, None),),
        queries=(1024,),
        fixed=(("seqlen_k", 1024), ("return_lse", True)),
    ),
    Calls(
        what="prefill of latent attention, dense and packed",
        dims=((192, 128),),
        masks=(FULL, CAUSAL),
        layouts=PACKED,
    ),
    Calls(
        what="the same with LSE, packed",
        dims=((192, 128),),
        masks=(FULL, CAUSAL),
        layouts=((VARLEN, VARLEN, None),),
        fixed=(("return_lse", True),),
    ),
    Calls(
        what="prefill with LSE, dense and packed",
        dims=((64, 64), (128, 128)),
        masks=(FULL, CAUSAL),
        layouts=PACKED,
        fixed=(("return_lse", True),),
    ),
    Calls(
        what="prefill with sinks (gpt-oss), dense and packed",
        dims=((64, 64),),
        masks=(CAUSAL, WINDOW),
        layouts=PACKED,
        fixed=SINK,
    ),
    Calls(
        what="prefill with softcap (Gemma 2), dense and packed",
        dims=((128, 128), (256, 256)),
        masks=(CAUSAL, WINDOW),
        layouts=PACKED,
        fixed=(("softcap", 50.0),),
    ),
    Calls(
        what="prefill, dense and packed",
        dims=((128, 128),),
        masks=(FULL, CAUSAL),
        layouts=PACKED,
        dtypes=(FP16,),
    ),
    Calls(
        what="decoding and short prompts, any splits, dense and packed",
        dims=((64, 64), (96, 96), (128, 128), (256, 256)),
        masks=ANY,
        layouts=PACKED,
        queries=FEW,
        splits=SPLIT,
        batches=BATCHES,
    ),
    Calls(
        what="short prompts of latent attention, dense and packed",
        dims=((192, 128),),
        masks=ANY,
        layouts=PACKED,
        queries=(1,),
    ),
    Calls(
        what="the same with LSE, packed",
        dims=((192, 128),),
        masks=ANY,
        layouts=((VARLEN, VARLEN, None),),
        queries=(1,),
        fixed=(("return_lse", True),),
    ),
    Calls(
        what="decoding from a dense cache, any splits",
        dims=((64, 64), (96, 96), (128, 128), (256, 256)),
        masks=ANY,
        layouts=((DENSE, DENSE, None),),
        queries=FEW,
        splits=SPLIT,
        batches=BATCHES,
        fixed=(("has_seqused_k", True),),
    ),
    Calls(
        what="chunked prefill, packed, from pages of 16 or of 64 n",
        dims=((64, 64), (128, 128), (256, 256)),
        masks=(CAUSAL,),
        layouts=((VARLEN, PAGED, 16), (VARLEN, PAGED, 64)),
    ),
    Calls(
        what="the same with sinks (gpt-oss)",
        dims=((64, 64),),
        masks=(CAUSAL, WINDOW),
        layouts=((VARLEN, PAGED, 16), (VARLEN, PAGED, 64)),
        fixed=SINK,
    ),
    Calls(
        what="chunked prefill, packed, from pages of 16 or of 64 n of e4m3 with factors",
        dims=((128, 128),),
        masks=(CAUSAL,),
        layouts=((VARLEN, PAGED, 16), (VARLEN, PAGED, 64)),
        fixed=FP8_CACHE,
    ),
    Calls(
        what="decoding and short chunks from pages of 16 of e4m3 with factors, packed, any splits",
        dims=((128, 128),),
        masks=ANY,
        layouts=((VARLEN, PAGED, 16),),
        queries=FEW,
        splits=SPLIT,
        batches=BATCHES,
        fixed=FP8_CACHE,
    ),
    Calls(
        what="decoding and short chunks from pages of 16 (packed) or of 64 n, any splits",
        dims=((64, 64), (128, 128), (256, 256)),
        masks=ANY,
        layouts=((VARLEN, PAGED, 16), (VARLEN, PAGED, 64), (DENSE, PAGED, 64)),
        queries=FEW,
        splits=SPLIT,
        batches=BATCHES,
        num_ratios=2,
    ),
    Calls(
        what="the same with sinks (gpt-oss), packed",
        dims=((64, 64),),
        masks=ANY,
        layouts=((VARLEN, PAGED, 16), (VARLEN, PAGED, 64)),
        queries=FEW,
        splits=SPLIT,
        batches=BATCHES,
        fixed=SINK,
    ),
    Calls(
        what="decoding, any splits, dense and packed from pages of 16",
        dims=((128, 128),),
        masks=ANY,
        layouts=((DENSE, DENSE, None), (VARLEN, PAGED, 16)),
        dtypes=(FP16,),
        queries=FEW,
        splits=SPLIT,
        batches=BATCHES,
    ),
)


OTHER_DIMS = (64, 128, 256)  # of the kernels that append and merge


def append_keys(variant: str) -> Iterator[AppendKey]:
    """Appending to dense and paged caches, without rotary tables and with those of Llama."""
    for dim, rotates, paged in product(OTHER_DIMS, (False, True), (False, True)):
        yield AppendKey(
            variant=variant,
            dtype=BF16,
            head_dim=dim,
            head_dim_v=dim,
            rotary_dim=dim if rotates else 0,
            interleaved=False,
            vector=8,
            packed_new=False,
            packed_q=False,
            paged=paged,
            has_batch_idx=False,
        )


def combine_keys(variant: str) -> Iterator[CombineKey]:
    """Merging stacked float32 parts, and two results; dense and packed."""
    for dim, stacked, packed in product(OTHER_DIMS, (True, False), (False, True)):
        yield CombineKey(
            variant=variant,
            dtype=torch.float32 if stacked else BF16,
            out_dtype=BF16,
            head_dim=dim,
            vector=4,
            stacked=stacked,
            packed=packed,
        )


def shipped_keys(variant: str) -> list[Any]:
    """The keys of the kernels that `variant` is shipped with, in a fixed order, each once."""
    capability = next(found for found, name in VARIANTS.items() if name == variant)
    card = Card(variant, capability, NUM_SMS)
    found: dict[Any, None] = {}
    for calls in SHIPPED:
        for problem in calls.problems():
            found[with_target(plan_on(problem, card).key)] = None
    for key in (*append_keys(variant), *combine_keys(variant)):
        found[with_target(key)] = None
    return list(found)


def all_keys() -> list[Any]:
    """The keys of all variants: what they share is one key."""
    return list(dict.fromkeys(key for name in VARIANTS.values() for key in shipped_keys(name)))


def table() -> list[str]:
    """The lines of README's table: what is precompiled."""
    lines = ["| calls | masks | head_dim | dtype | heads |", "|---|---|---|---|---|"]
    for calls in SHIPPED:
        masks = "any" if calls.masks is ANY else ", ".join(_MASKS[mask] for mask in calls.masks)
        dims = ", ".join(str(d) if d == d_v else f"{d} and {d_v} for v" for d, d_v in calls.dims)
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in calls.dtypes)
        lines.append(f"| {calls.what} | {masks} | {dims} | {dtypes} | {calls.num_ratios} |")
    dims = ", ".join(map(str, OTHER_DIMS))
    for what in (
        "appending to dense and paged caches, without rotary tables and with those of Llama",
        "merging stacked float32 parts to bfloat16, or two bfloat16 results; dense and packed",
    ):
        lines.append(f"| {what} | | {dims} | bfloat16 | |")
    return lines


def ratios() -> str:
    """README's words for RATIOS."""
    both = [f"{n} at {d}" for d, (n, *_) in RATIOS.items()]
    more = [f"{n} at {d}" for d, (_, *others) in RATIOS.items() for n in others]
    return f"{', '.join(both)}; where heads is 2, also {', '.join(more)}"


_MASKS = {FULL: "no mask", CAUSAL: "causal", WINDOW: "sliding window"}
