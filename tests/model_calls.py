"""What current models ask for: their attention layers, and the calls that engines make of them.

Shapes are those of the models' published configurations. Calls are those of transformers
(`modeling_flash_attention_utils`, continuous batching) and of our vLLM plugin, as it cuts a batch
into what decodes, chunks of prompts that go on, and prompts that begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from flash_attn4_cute.device import Card
from flash_attn4_cute.mask_rule import FULL, Band
from flash_attn4_cute.problem import AttentionProblem, Layout

BF16, FP16 = torch.bfloat16, torch.float16
DENSE, VARLEN, PAGED = Layout.DENSE, Layout.VARLEN, Layout.PAGED

# One card of each kind that is sold; what is planned depends on the number of SMs.
CARDS = (
    Card("H200", (9, 0), 132),
    Card("B200", (10, 0), 148),
    Card("B300", (10, 3), 148),
    Card("GB300", (10, 3), 160),
    Card("RTX 5090", (12, 0), 170),
    Card("RTX PRO 6000", (12, 0), 188),
    Card("GB10", (12, 1), 48),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The attention layers of a model.

    `windows` are those of its kinds of layers, in keys before a query's own; None sees all.
    `degrees` are numbers of cards that its heads are dealt to in a serving engine.
    """

    name: str
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int = 0  # 0: head_dim
    windows: tuple[int | None, ...] = (None,)
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = BF16
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    fp8_caches: bool = False


def _decoder(name: str, heads: int, heads_kv: int, head_dim: int, **more: Any) -> Model:
    plain = not (more.get("softcap") or more.get("sinks"))
    more = {"fp8_caches": plain and head_dim == 128} | more
    return Model(name=name, heads=heads, heads_kv=heads_kv, head_dim=head_dim, **more)


DECODERS = (
    *(_decoder("Llama-2-7B", 32, 32, 128, dtype=dtype, fp8_caches=False) for dtype in (FP16, BF16)),
    _decoder("Llama-2-13B", 40, 40, 128, dtype=FP16, fp8_caches=False),
    _decoder("Llama-2-70B", 64, 8, 128, dtype=FP16, fp8_caches=False),
    _decoder("Llama-3.1-8B and Qwen3-8B as AWQ", 32, 8, 128, dtype=FP16, fp8_caches=False),
    _decoder("Llama-3.2-1B", 32, 8, 64, degrees=(1,)),
    _decoder("Llama-3.2-3B", 24, 8, 128, degrees=(1, 2)),
    _decoder("Llama-3.1-8B", 32, 8, 128),
    _decoder("Llama-3.3-70B", 64, 8, 128),
    _decoder("Llama-3.1-405B", 128, 8, 128, degrees=(8,)),
    _decoder("Qwen2-7B, Qwen2.5-7B", 28, 4, 128, degrees=(1, 2, 4)),
    _decoder("Qwen2.5-0.5B", 14, 2, 64, degrees=(1, 2)),
    _decoder("Qwen2.5-1.5B", 12, 2, 128, degrees=(1, 2)),
    _decoder("Qwen2.5-3B", 16, 2, 128, degrees=(1, 2)),
    _decoder("Qwen2.5-14B, Qwen2.5-32B", 40, 8, 128),
    _decoder("Qwen2.5-72B", 64, 8, 128),
    _decoder("Qwen3-0.6B, Qwen3-1.7B", 16, 8, 128, degrees=(1, 2)),
    _decoder("Qwen3-4B, Qwen3-8B", 32, 8, 128),
    _decoder("Qwen3-14B", 40, 8, 128),
    _decoder("Qwen3-32B", 64, 8, 128),
    _decoder("Qwen3-30B-A3B", 32, 4, 128),
    _decoder("Qwen3-235B-A22B", 64, 4, 128, degrees=(4, 8)),
    _decoder("Mistral-7B-v0.1", 32, 8, 128, windows=(4095,)),
    _decoder("Mistral-Nemo, Mistral-Small, Ministral-8B", 32, 8, 128),
    _decoder("Mixtral-8x7B", 32, 8, 128),
    _decoder("Mixtral-8x22B", 48, 8, 128, degrees=(2, 4, 8)),
    _decoder("GLM-4-9B", 32, 2, 128, degrees=(1, 2)),
    _decoder("GLM-4.5, GLM-4.5-Air", 96, 8, 128, degrees=(4, 8)),
    _decoder("Granite-3.3-2B", 32, 8, 64, degrees=(1,)),
    _decoder("OLMo-2-7B", 32, 32, 128, degrees=(1, 2)),
    _decoder("Phi-3-mini-4k", 32, 32, 96, windows=(2046,), degrees=(1, 2)),
    _decoder("Phi-3-mini-128k, Phi-3.5-mini", 32, 32, 96, degrees=(1, 2)),
    _decoder("Phi-3-medium, Phi-4", 40, 10, 128, degrees=(1, 2)),
    _decoder("Phi-4-mini", 24, 8, 128, degrees=(1, 2)),
    _decoder("Gemma-2-2B", 8, 4, 256, windows=(None, 4095), softcap=50.0, degrees=(1, 2)),
    _decoder("Gemma-2-9B", 16, 8, 256, windows=(None, 4095), softcap=50.0),
    _decoder("Gemma-2-27B", 32, 16, 128, windows=(None, 4095), softcap=50.0),
    _decoder("Gemma-3-1B", 4, 1, 256, windows=(None, 511), degrees=(1,)),
    _decoder("Gemma-3-4B", 8, 4, 256, windows=(None, 1023), degrees=(1, 2, 4)),
    _decoder("Gemma-3-12B", 16, 8, 256, windows=(None, 1023)),
    _decoder("Gemma-3-27B", 32, 16, 128, windows=(None, 1023), fp8_caches=False),
    _decoder("gpt-oss-20b, gpt-oss-120b", 64, 8, 64, windows=(None, 127), sinks=True),
    _decoder("SmolLM2-135M", 9, 3, 64, degrees=(1,)),
    _decoder("SmolLM2-360M", 15, 5, 64, degrees=(1,)),
    _decoder("SmolLM2-1.7B", 32, 32, 64, degrees=(1,)),
    _decoder("SmolLM3-3B", 16, 4, 128, degrees=(1, 2)),
)
# Multi-head latent attention as prefill runs it, its keys made anew from the latent cache.
LATENT = (_decoder("DeepSeek-V3, DeepSeek-R1, Kimi-K2", 128, 128, 192, head_dim_v=128),)
ENCODERS = tuple(
    Model(name=name, heads=heads, heads_kv=heads, head_dim=d, windows=windows, dtype=dtype)
    for name, heads, d, windows in (
        ("MiniLM-L6, MiniLM-L12, bge-small, e5-small", 12, 32, (None,)),
        ("BERT-base, bge-base, e5-base, MPNet, nomic-embed", 12, 64, (None,)),
        ("BERT-large, bge-large, bge-m3, e5-large", 16, 64, (None,)),
        ("ModernBERT-base", 12, 64, (None, 64)),
        ("ModernBERT-large", 16, 64, (None, 64)),
    )
    for dtype in (BF16, FP16)
)
VISION = tuple(
    Model(name=name, heads=heads, heads_kv=heads, head_dim=d)
    for name, heads, d in (
        ("CLIP-L, SigLIP-B", 16, 64),
        ("SigLIP-so400m", 16, 72),
        ("Qwen2.5-VL's tower", 16, 80),
    )
)
DIFFUSION = (Model(name="FLUX.1, Qwen-Image", heads=24, heads_kv=24, head_dim=128),)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an engine: `what` it is, and its shape."""

    what: str
    q_layout: Layout
    kv_layout: Layout
    shapes: tuple[tuple[int, int, int], ...]  # of the batch, its longest queries and keys
    page_size: int | None = None
    used: bool = False
    lse: bool = False
    fp8: bool = False
    sees_all: bool = False  # not causal: a window, if there is one, is to both sides


PROMPTS = ((1, 20, 20), (1, 130, 130), (1, 512, 512), (1, 2000, 2000), (1, 8192, 8192),
           (1, 12000, 12000), (4, 130, 130), (4, 2000, 2000))  # fmt: skip
GOING_ON = ((1, 20, 900), (1, 100, 2000), (1, 512, 8192), (1, 2048, 32768), (4, 1024, 4096),
            (1, 8192, 16384))  # fmt: skip
CHUNKS = (*GOING_ON, (1, 300, 300), (8, 2000, 2000))
TOKENS = tuple((b, 1, s) for b, s in product((1, 8, 256), (200, 2000, 16384)))
DRAFTS = ((1, 4, 2000), (8, 4, 16384))
STEPS = TOKENS + DRAFTS

TRANSFORMERS = (
    Call("prefill, and going on with a dense cache", DENSE, DENSE, PROMPTS + GOING_ON),
    Call("padded or packed batches, continuous batching", VARLEN, VARLEN, PROMPTS + GOING_ON),
    Call("decoding from a dense cache", DENSE, DENSE, STEPS),
    Call("decoding a padded batch", VARLEN, VARLEN, TOKENS),
    Call("decoding, flash_attn_with_kvcache", DENSE, DENSE, STEPS, used=True),
)
BLOCK_TABLES = Call("continuous batching, block tables", DENSE, PAGED, TOKENS, 256, used=True)


def _of_vllm(page_size: int) -> tuple[Call, ...]:
    return (
        Call(f"chunks, pages of {page_size}", VARLEN, PAGED, CHUNKS, page_size, True),
        Call(f"decoding, pages of {page_size}", VARLEN, PAGED, STEPS, page_size, True),
    )


VLLM = (
    Call("prompts that begin", VARLEN, VARLEN, PROMPTS),
    *_of_vllm(16),
    *_of_vllm(32),
    *_of_vllm(64),
    Call("chunks, e4m3", VARLEN, PAGED, CHUNKS, 16, True, fp8=True),
    Call("decoding, e4m3", VARLEN, PAGED, STEPS, 16, True, fp8=True),
)
OF_LATENT = (
    Call("prefill", DENSE, DENSE, PROMPTS + GOING_ON),
    Call("packed prefill", VARLEN, VARLEN, PROMPTS),
    Call("packed prefill with LSE", VARLEN, VARLEN, PROMPTS, lse=True),
    Call("earlier keys, with LSE", VARLEN, VARLEN, GOING_ON, lse=True, sees_all=True),
)
IMAGES = tuple((b, s, s) for b, s in product((1, 4, 32), (256, 729, 4096)))
OF_VISION = (
    Call("dense", DENSE, DENSE, IMAGES, sees_all=True),
    Call("packed", VARLEN, VARLEN, IMAGES, sees_all=True),
)
PATCHES = Call(
    "windows of 64 patches", VARLEN, VARLEN, ((16, 64, 64), (144, 64, 64)), sees_all=True
)
OF_ENCODERS = (
    Call("dense", DENSE, DENSE, PROMPTS, sees_all=True),
    Call("padded or packed", VARLEN, VARLEN, PROMPTS, sees_all=True),
)


def calls() -> Iterator[tuple[Model, Call, int]]:
    """Every call of the table, with the number of cards that the heads are dealt to."""
    for model in DECODERS:
        if 1 in model.degrees:
            yield from ((model, call, 1) for call in TRANSFORMERS)
            if model.windows == (None,):  # transformers has block tables for no other
                yield model, BLOCK_TABLES, 1
        for call, degree in product(VLLM, model.degrees):
            if model.fp8_caches or not call.fp8:
                yield model, call, degree
    for model in LATENT:
        yield from ((model, call, degree) for call, degree in product(OF_LATENT, model.degrees))
    yield from ((model, call, 1) for model, call in product(ENCODERS, OF_ENCODERS))
    yield from ((model, call, 1) for model, call in product(VISION, OF_VISION))
    yield VISION[-1], PATCHES, 1
    yield from ((model, OF_VISION[0], 1) for model in DIFFUSION)


def problems(model: Model, call: Call, degree: int) -> Iterator[AttentionProblem]:
    """The call as the planner sees it, of each kind of layer and in each size."""
    for window, (batch, queries, keys) in product(model.windows, call.shapes):
        lefts = [window]
        if window is not None and keys <= window + 1:
            lefts.append(None)  # vLLM passes the window even so, transformers does not
        for left in lefts:
            mask: Any = Band(left, left if call.sees_all else 0)
            yield AttentionProblem(
                device=torch.device("cuda", 0),
                dtype=model.dtype,
                batch=batch,
                seqlen_q=queries,
                seqlen_k=keys,
                num_heads=model.heads // degree,
                num_heads_kv=max(1, model.heads_kv // degree),
                head_dim=model.head_dim,
                head_dim_v=model.head_dim_v or model.head_dim,
                q_layout=call.q_layout,
                kv_layout=call.kv_layout,
                page_size=call.page_size,
                mask=FULL if mask == Band(None, None) else mask,
                softmax_scale=model.head_dim**-0.5,
                softcap=model.softcap,
                has_seqused_q=False,
                has_seqused_k=call.used,
                has_kv_batch_idx=False,
                has_sink=model.sinks,
                sink_dtype=model.dtype if model.sinks else None,
                has_alibi=False,
                score_mod=None,
                dropout_p=0.0,
                deterministic=False,
                num_splits=0,
                pack_gqa=None,
                return_lse=call.lse,
                requires_grad=False,
                fp8_kv=call.fp8,
                has_k_descale=call.fp8,
                has_v_descale=call.fp8,
            )
