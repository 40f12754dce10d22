"""The calls whose kernels are precompiled, as data: what current models ask for.

A row is a kind of calls, not a kernel: the plan says which kernel answers each, on each card. Which
models these are and what they ask is written down in tests/model_calls.py, beside what is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ..mask_rule import FULL, Band
from ..problem import AttentionProblem, Layout

BF16, FP16 = torch.bfloat16, torch.float16
DENSE, VARLEN, PAGED = Layout.DENSE, Layout.VARLEN, Layout.PAGED
CAUSAL, WINDOW = Band(None, 0), Band(127, 0)
ANY = (CAUSAL,)  # the decode kernel has both bounds whatever it is asked for
HEADS_KV = 8
_MASKS = {FULL: "no mask", CAUSAL: "causal", WINDOW: "window"}
_STEPS = {"has_sink": "sinks", "softcap": "softcap", "fp8_kv": "e4m3", "return_lse": "LSE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Calls of one kind: every combination of what is listed.

    `dims` are (head_dim, head_dim_v), `layouts` (of queries, of keys, tokens a page or None).
    `queries` are tokens of the longest sequence. `splits` are numbers of parts of the keys; one
    kernel serves all that are more than one, and what the plan chooses by itself is among them.
    `ratios` are query heads to a key head: the tcgen05 kernels are compiled for them, where heads
    share tiles. `fixed` are further fields of AttentionProblem. `split_on` names the family of the
    cards that get kernels for more than one split; None: all do.
    """

    what: str
    dims: tuple[tuple[int, int], ...]
    masks: tuple[Any, ...]
    layouts: tuple[tuple[Layout, Layout, int | None], ...]
    dtypes: tuple[torch.dtype, ...] = (BF16,)
    queries: tuple[int, ...] = (4096,)
    splits: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (2,)
    ratios: tuple[int, ...] = (4,)
    fixed: tuple[tuple[str, Any], ...] = ()
    split_on: str | None = None

    def kind(self) -> str:
        """What the row is of beside `what`, for README: head_dim, masks, dtypes, steps, ratios."""
        dims = ", ".join(str(d) if d == d_v else f"{d} and {d_v} for v" for d, d_v in self.dims)
        more = [] if self.masks is ANY else [_MASKS[mask] for mask in self.masks]
        if self.dtypes != (BF16,):
            more += [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        more += [name for field, name in _STEPS.items() if field in dict(self.fixed)]
        if self.masks is not ANY:
            more.append("ratio " + " ".join(map(str, sorted(self.ratios))))
        return f"{dims}: {', '.join(more)}" if more else dims

    def problems(self, family: str) -> Iterator[AttentionProblem]:
        """The calls as the planner sees them, on cards whose own kernels are of `family`."""
        is_split = self.split_on in (None, family)
        splits_here = tuple(n for n in self.splits if n == 1 or is_split)
        choices = (self.dims, self.masks, self.layouts, self.dtypes, self.queries, splits_here)
        for dims, mask, layout, dtype, queries, splits, batch, ratio in product(
            *choices, self.batches, self.ratios
        ):
            yield AttentionProblem(
                **_COMMON
                | {
                    "batch": batch,
                    "num_heads": HEADS_KV * ratio,
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
                    "has_seqused_k": layout[1] is PAGED,
                }
                | dict(self.fixed)
            )


_COMMON: dict[str, Any] = {
    "device": torch.device("cuda", 0),
    "seqlen_k": 4096,
    "num_heads_kv": HEADS_KV,
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
IN_ONE = (DENSE, DENSE, None)
JOINED = (VARLEN, VARLEN, None)
PACKED = (IN_ONE, JOINED)
P16, P32, P64 = ((VARLEN, PAGED, n) for n in (16, 32, 64))
BATCHED64 = (DENSE, PAGED, 64)  # continuous batching of transformers: pages of 256
D32, D64, D80, D96, D128, D256 = ((d, d) for d in (32, 64, 80, 96, 128, 256))
D192 = (192, 128)
# One kernel serves all numbers of splits that are more than one, and the plan splits where there
# would be few CTAs: in small batches, with few heads on a card, late in a prompt.
SPLIT_OR_NOT: dict[str, Any] = {"splits": (1, 2)}
# The plan of tcgen05 kernels splits a prompt that begins only where a card has five heads or less,
# as it may in an engine; else few queries that go on with many keys, which engines keep in pages.
SPLIT_ON_MMA: dict[str, Any] = SPLIT_OR_NOT | {"split_on": "sm120"}
# Of the decode kernel: up to 16 packed rows and more, whole keys and split ones, few CTAs and many.
DECODE: dict[str, Any] = {
    "masks": ANY, "queries": (1, 8), "splits": (1, 4), "batches": (2, 64),
}  # fmt: skip
LSE = (("return_lse", True),)
SINK = (("has_sink", True), ("sink_dtype", BF16))
SOFTCAP = (("softcap", 50.0),)
FP8_CACHE = (("fp8_kv", True), ("has_k_descale", True), ("has_v_descale", True))
USED = (("has_seqused_k", True),)
# Query heads to a key head at head_dim 128, the most frequent first: Llama 3, Qwen3 and Mistral;
# the large ones of these; Qwen3 1.7B and Gemma 3 27B; Qwen2.5 7B; 14B and 32B; Llama 2; Llama 3.2
# 3B and Phi-4 mini; Qwen2.5 1.5B; Qwen3 235B, Llama 3.1 405B and GLM-4 9B.
RATIOS = (4, 8, 2, 7, 5, 1, 3, 6, 16)
# Dense prompts of few tokens: there heads share tiles at each ratio, and CTAs are not in pairs.
BRIEF: dict[str, Any] = {"queries": (130,), "fixed": (("seqlen_k", 1024),)}
# Of so many, too, and CTAs are: others that are not a power of two fill their last tiles less.
LONG: dict[str, Any] = {"queries": (12000,), "fixed": (("seqlen_k", 12000),)}

PROMPTS = "prompts, dense and packed, any splits but on B200 and B300"
SPLIT_PACKED = "prompts, packed, any splits"
PAIRS = "long dense prompts, which pairs of CTAs work on on B200 and B300"
_PROMPTS = (
    Calls(
        what=PROMPTS, dims=(D128,), masks=(CAUSAL,), layouts=PACKED, ratios=RATIOS, **BRIEF,
        **SPLIT_ON_MMA,
    ),
    # Small models: Llama 3.2 1B, SmolLM2, Qwen2.5 0.5B. Then Phi-3 mini, and Gemma 3.
    Calls(
        what=PROMPTS, dims=(D64,), masks=(CAUSAL,), layouts=PACKED, ratios=(4, 3, 7, 1), **BRIEF,
        **SPLIT_ON_MMA,
    ),
    Calls(
        what=PROMPTS, dims=(D96,), masks=(CAUSAL,), layouts=PACKED, ratios=(1,), **SPLIT_ON_MMA,
    ),
    Calls(
        what=PROMPTS, dims=(D256,), masks=(CAUSAL, WINDOW), layouts=PACKED, ratios=(2, 4),
        **SPLIT_ON_MMA,
    ),
    # Mistral and Gemma 3 27B; gpt-oss; Gemma 2.
    Calls(
        what=PROMPTS, dims=(D128,), masks=(WINDOW,), layouts=PACKED, ratios=(4, 2), **SPLIT_ON_MMA,
    ),
    Calls(
        what=PROMPTS, dims=(D64,), masks=(CAUSAL, WINDOW), layouts=PACKED, ratios=(8,), fixed=SINK,
        **SPLIT_ON_MMA,
    ),
    Calls(
        what=PROMPTS, dims=(D256,), masks=(CAUSAL, WINDOW), layouts=PACKED, ratios=(2,),
        fixed=SOFTCAP, **SPLIT_ON_MMA,
    ),
    # Llama 2, and what is quantised by AWQ.
    Calls(
        what=PROMPTS, dims=(D128,), masks=(CAUSAL,), layouts=PACKED, dtypes=(FP16,), ratios=(4, 1),
        **BRIEF, **SPLIT_ON_MMA,
    ),
    Calls(
        what="prompts, dense and packed, any splits", dims=(D128,), masks=(CAUSAL,), layouts=PACKED,
        ratios=(4, 8), **BRIEF, **SPLIT_OR_NOT,
    ),
    Calls(
        what=SPLIT_PACKED, dims=(D128,), masks=(CAUSAL,), layouts=(JOINED,), ratios=(1, 2, 5),
        **SPLIT_OR_NOT,
    ),
    Calls(
        what=SPLIT_PACKED, dims=(D128,), masks=(WINDOW,), layouts=(JOINED,), ratios=(2, 4),
        **SPLIT_OR_NOT,
    ),
    Calls(
        what=SPLIT_PACKED, dims=(D256,), masks=(CAUSAL, WINDOW), layouts=(JOINED,), ratios=(2,),
        **SPLIT_OR_NOT,
    ),
    Calls(
        what=SPLIT_PACKED, dims=(D256,), masks=(CAUSAL, WINDOW), layouts=(JOINED,), ratios=(2,),
        fixed=SOFTCAP, **SPLIT_OR_NOT,
    ),
    Calls(
        what=SPLIT_PACKED, dims=(D128,), masks=(CAUSAL,), layouts=(JOINED,), dtypes=(FP16,),
        ratios=(1, 4), **SPLIT_OR_NOT,
    ),
    Calls(
        what=PAIRS, dims=(D128,), masks=(CAUSAL,), layouts=(IN_ONE,), ratios=RATIOS, **LONG,
    ),
    Calls(
        what=PAIRS, dims=(D128,), masks=(CAUSAL,), layouts=(IN_ONE,), dtypes=(FP16,), ratios=(4, 1),
        **LONG,
    ),
    Calls(what=PAIRS, dims=(D192,), masks=(CAUSAL,), layouts=(IN_ONE,), ratios=(1,), **LONG),
    # Latent attention: new tokens, and in a launch of its own what they see of earlier ones.
    Calls(
        what="prompts, dense and packed", dims=(D192,), masks=(CAUSAL,), layouts=PACKED,
        ratios=(1,), **BRIEF,
    ),
    Calls(
        what="prompts, packed", dims=(D192,), masks=(CAUSAL,), layouts=(JOINED,), ratios=(1,),
        fixed=LSE,
    ),
    Calls(
        what=SPLIT_PACKED, dims=(D192,), masks=(FULL,), layouts=(JOINED,),
        ratios=(1,), fixed=LSE, **SPLIT_OR_NOT,
    ),
    # Attention whose results are merged: rings, shared prefixes.
    Calls(
        what="prompts, dense and packed", dims=(D128,), masks=(FULL, CAUSAL), layouts=PACKED,
        fixed=LSE,
    ),
    Calls(
        what="dense prompts of up to 4095 tokens", dims=(D128,), masks=(CAUSAL,), layouts=(IN_ONE,),
        queries=(1024,), fixed=(("seqlen_k", 1024), *LSE),
    ),
)  # fmt: skip

WHOLE = "encoders and vision towers, dense and packed"
_ENCODERS = (
    # MiniLM and BERT; ModernBERT; towers with heads of 72, 80 and 96.
    Calls(
        what=WHOLE, dims=(D32, D64), masks=(FULL,), layouts=PACKED, dtypes=(BF16, FP16),
        ratios=(1,),
    ),
    Calls(
        what=WHOLE, dims=(D64,), masks=(WINDOW,), layouts=PACKED, dtypes=(BF16, FP16), ratios=(1,),
    ),
    Calls(what=WHOLE, dims=(D96,), masks=(FULL,), layouts=PACKED, ratios=(1,)),
    Calls(
        what="their texts of up to 64 tokens, dense and packed", dims=(D32, D64), masks=ANY,
        layouts=PACKED, dtypes=(BF16, FP16), ratios=(1,), queries=(32,),
    ),
    Calls(
        what="windows of 64 patches (Qwen2.5-VL), packed", dims=(D80,), masks=ANY,
        layouts=(JOINED,), ratios=(1,), queries=(64,),
    ),
    Calls(
        what="diffusion transformers, dense", dims=(D128,), masks=(FULL,), layouts=(IN_ONE,),
        ratios=(1,), queries=(4096, 130),
    ),
)  # fmt: skip

DECODING = "decoding and short prompts, dense and packed, any splits"
CACHE = "decoding from a dense cache with cache_seqlens, any splits"
_DECODING = (
    Calls(what=DECODING, dims=(D64, D96, D128, D256), layouts=PACKED, **DECODE),
    Calls(what=DECODING, dims=(D64,), layouts=PACKED, fixed=SINK, **DECODE),
    Calls(what=DECODING, dims=(D256,), layouts=PACKED, fixed=SOFTCAP, **DECODE),
    Calls(what=DECODING, dims=(D128,), layouts=PACKED, dtypes=(FP16,), **DECODE),
    Calls(
        what="short prompts, dense, any splits", dims=(D192,), masks=ANY, layouts=(IN_ONE,),
        queries=(1,), **SPLIT_OR_NOT,
    ),
    Calls(what="short prompts, packed", dims=(D192,), masks=ANY, layouts=(JOINED,), queries=(1,)),
    Calls(
        what="short prompts, packed, any splits", dims=(D192,), masks=ANY, layouts=(JOINED,),
        queries=(1,), fixed=LSE, **SPLIT_OR_NOT,
    ),
    Calls(what=CACHE, dims=(D64, D128, D256), layouts=(IN_ONE,), fixed=USED, **DECODE),
    Calls(
        what="the same, one token", dims=(D96,), layouts=(IN_ONE,), fixed=USED,
        **(DECODE | {"queries": (1,)}),
    ),
)  # fmt: skip

CHUNKS16, CHUNKS32, CHUNKS64 = (
    f"chunks of prompts, packed, pages of {n}, any splits" for n in (16, 32, 64)
)
STEPS16, STEPS32, STEPS64 = (
    f"decoding and short chunks, packed, pages of {n}, any splits" for n in ("16", "32", "64 n")
)
_PAGED = (
    Calls(
        what=CHUNKS16, dims=(D128,), masks=(CAUSAL,), layouts=(P16,), ratios=RATIOS, **SPLIT_OR_NOT,
    ),
    Calls(what=CHUNKS16, dims=(D64,), masks=(CAUSAL,), layouts=(P16,), **SPLIT_OR_NOT),
    Calls(
        what=CHUNKS16, dims=(D96,), masks=(CAUSAL,), layouts=(P16,), ratios=(1,), **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS16, dims=(D256,), masks=(CAUSAL, WINDOW), layouts=(P16,), ratios=(2,),
        **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS16, dims=(D128,), masks=(WINDOW,), layouts=(P16,), ratios=(4, 2), **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS16, dims=(D64,), masks=(CAUSAL, WINDOW), layouts=(P16,), ratios=(8,), fixed=SINK,
        **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS16, dims=(D256,), masks=(CAUSAL, WINDOW), layouts=(P16,), ratios=(2,),
        fixed=SOFTCAP, **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS16, dims=(D128,), masks=(CAUSAL,), layouts=(P16,), fixed=FP8_CACHE,
        **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS16, dims=(D128,), masks=(CAUSAL,), layouts=(P16,), dtypes=(FP16,), ratios=(4, 1),
        **SPLIT_OR_NOT,
    ),
    Calls(what=CHUNKS32, dims=(D128,), masks=(CAUSAL,), layouts=(P32,), **SPLIT_OR_NOT),
    Calls(what=CHUNKS64, dims=(D64,), masks=(CAUSAL,), layouts=(P64,), **SPLIT_OR_NOT),
    Calls(
        what=CHUNKS64, dims=(D128,), masks=(CAUSAL,), layouts=(P64,), ratios=(4, 8), **SPLIT_OR_NOT,
    ),
    Calls(
        what=CHUNKS64, dims=(D256,), masks=(CAUSAL,), layouts=(P64,), ratios=(2,), **SPLIT_OR_NOT,
    ),
    Calls(
        what="the same, not split", dims=(D64,), masks=(CAUSAL, WINDOW), layouts=(P64,),
        ratios=(8,), fixed=SINK,
    ),
    Calls(
        what="the same, not split", dims=(D128,), masks=(CAUSAL,), layouts=(P64,), fixed=FP8_CACHE,
    ),
    Calls(what=STEPS16, dims=(D64, D96, D128, D256), layouts=(P16,), **DECODE),
    Calls(what=STEPS16, dims=(D64,), layouts=(P16,), fixed=SINK, **DECODE),
    Calls(what=STEPS16, dims=(D256,), layouts=(P16,), fixed=SOFTCAP, **DECODE),
    Calls(what=STEPS16, dims=(D128,), layouts=(P16,), fixed=FP8_CACHE, **DECODE),
    Calls(what=STEPS16, dims=(D128,), layouts=(P16,), dtypes=(FP16,), **DECODE),
    Calls(what=STEPS32, dims=(D128,), layouts=(P32,), **DECODE),
    Calls(what=STEPS64, dims=(D64, D128, D256), layouts=(P64,), **DECODE),
    Calls(what=STEPS64, dims=(D64,), layouts=(P64,), fixed=SINK, **DECODE),
    Calls(
        what="decoding one token, dense queries, pages of 64 n (continuous batching), any splits",
        dims=(D64, D128, D256), layouts=(BATCHED64,), **(DECODE | {"queries": (1,)}),
    ),
)  # fmt: skip
SHIPPED: tuple[Calls, ...] = (*_PROMPTS, *_ENCODERS, *_DECODING, *_PAGED)
