"""What current models ask for is precompiled, on each card, but for what is named here.

Nothing is compiled or run: the plan of each call of `model_calls` says which kernel it needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flash_attn4_cute.build.shipped import all_keys
from flash_attn4_cute.compiler import with_target
from flash_attn4_cute.device import Card
from flash_attn4_cute.mask_rule import Band
from flash_attn4_cute.plan import plan_on
from flash_attn4_cute.problem import AttentionProblem, Layout

from . import model_calls

FP16 = torch.float16
# Of chunks from pages of 64, query heads to a key head that the tcgen05 kernels are compiled for.
RATIOS_OF_PAGES_OF_64 = {64: (4,), 128: (4, 8), 256: (2,)}


def ratio(p: AttentionProblem) -> int:
    return p.num_heads // p.num_heads_kv


def has_window(p: AttentionProblem) -> bool:
    return isinstance(p.mask, Band) and p.mask.left is not None


def is_plain(p: AttentionProblem) -> bool:
    """Bfloat16, and nothing beside the causal mask."""
    return p.dtype == torch.bfloat16 and not (has_window(p) or p.softcap or p.has_sink)


def is_dense(p: AttentionProblem) -> bool:
    return p.q_layout is p.kv_layout is Layout.DENSE


def on_tcgen05(key: Any) -> bool:
    return key.family == "sm100"


def pairs(key: Any) -> bool:
    """Whether CTAs work in pairs where they need not."""
    return key.cfg.ctas == 2 and key.cfg.q_tiles == 2


# Why a call that needs a kernel which is not in the set is left out, and of which calls that is
# said. They compile theirs when they are first made.
Applies = Callable[[AttentionProblem, Any], bool]
LEFT_OUT: tuple[tuple[str, Applies], ...] = (
    (
        "pages of 32 but for plain heads of 128, four to a key head: vLLM has 16 unless told",
        lambda p, key: (
            p.page_size == 32 and not (is_plain(p) and p.head_dim == 128 and ratio(p) == 4)
        ),
    ),
    (
        "pages of 64 but for plain heads at the most frequent ratios: the same",
        lambda p, key: (
            p.page_size == 64
            and not (is_plain(p) and ratio(p) in RATIOS_OF_PAGES_OF_64.get(p.head_dim, ()))
        ),
    ),
    (
        "Gemma 2 27B: the only model with softcap at 128",
        lambda p, key: p.softcap > 0 and p.head_dim == 128,
    ),
    (
        "Llama 2 70B in float16 on B200 and B300: it is older than these cards",
        lambda p, key: p.dtype == FP16 and ratio(p) == 8 and on_tcgen05(key),
    ),
    (
        "dense caches with cache_seqlens that are not plain: transformers calls without",
        lambda p, key: is_dense(p) and p.has_seqused_k and not is_plain(p),
    ),
    (
        "block tables of continuous batching, float16 or Phi-3 mini: off by default",
        lambda p, key: p.page_size == 256 and (p.dtype == FP16 or p.head_dim == 96),
    ),
    (
        "Phi-3 mini 4k beyond its window of 2047 tokens: few know it",
        lambda p, key: p.head_dim == 96 and has_window(p),
    ),
    (
        "few queries that go on with many keys in transformers on B200 and B300, but at the most "
        "frequent ratios: engines that chunk prompts have pages",
        lambda p, key: (
            p.page_size is None
            and p.seqlen_q < p.seqlen_k
            and on_tcgen05(key)
            and key.merged_dim > 0
            and not (is_plain(p) and p.head_dim == 128 and ratio(p) in (4, 8) and not pairs(key))
        ),
    ),
    (
        "latent attention with few queries on many dense keys: engines pack",
        lambda p, key: is_dense(p) and p.head_dim == 192 and key.merged_dim > 0,
    ),
    (
        "SmolLM2, Qwen2.5 0.5B and Gemma 3 1B in vLLM on B200 and B300: models for small devices",
        lambda p, key: (
            p.page_size == 16
            and (p.head_dim, ratio(p)) in {(64, 1), (64, 3), (64, 7), (256, 4)}
            and on_tcgen05(key)
        ),
    ),
    (
        "GLM 4.5 on B200 and B300: the only models with twelve heads to a key head",
        lambda p, key: ratio(p) == 12 and on_tcgen05(key),
    ),
    (
        "e4m3 caches under a window: Mistral's first model has the only one",
        lambda p, key: p.fp8_kv and has_window(p),
    ),
)


def missing_kernels() -> Iterator[tuple[str, AttentionProblem, Card, Any]]:
    """Each call of the table, on each card, whose kernel is not in the set."""
    shipped, planned = set(all_keys()), set()
    for model, call, degree in model_calls.calls():
        for problem in model_calls.problems(model, call, degree):
            if problem in planned:
                continue
            planned.add(problem)
            for card in model_calls.CARDS:
                key = with_target(plan_on(problem, card).key)
                if key not in shipped:
                    yield f"{model.name} on {degree}: {call.what}", problem, card, key


def test_what_models_ask_for_is_precompiled():
    """Every call of the table needs a kernel of the set, or is left out with a reason."""
    missing: Counter[str] = Counter()
    used = set()
    for what, problem, card, key in missing_kernels():
        reasons = [reason for reason, applies in LEFT_OUT if applies(problem, key)]
        used.update(reasons[:1])
        if not reasons:
            missing[f"{what}, {card.name}"] += 1
    assert not missing, "\n".join(f"{what} ({n} sizes)" for what, n in sorted(missing.items()))
    assert used == {reason for reason, _ in LEFT_OUT}, "nothing is left out for one of the reasons"
