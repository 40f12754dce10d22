"""A small call for each precompiled attention kernel: one that this very kernel answers."""

import math
from dataclasses import replace
from typing import Any

from flash_attn4_cute.build.shipped import asked
from flash_attn4_cute.mask_rule import FULL, Band
from flash_attn4_cute.problem import AttentionProblem, Layout
from flash_attn4_cute.sm100.pairing import SEEN_KEYS

from .cases import Case

SHORT = 130  # tokens that stand for a long prompt: more rows than the decode kernel takes
MANY = 70  # times the sequences: more CTAs than an H200 has SMs
PAIRED = 500  # the same where CTAs work in pairs: nearly all rows of one, at any ratio of heads
LAYOUTS = {
    (Layout.DENSE, Layout.DENSE): "dense",
    (Layout.VARLEN, Layout.VARLEN): "varlen",
    (Layout.VARLEN, Layout.PAGED): "paged",
    (Layout.DENSE, Layout.PAGED): "paged_dense",
}


def small_case(problem: AttentionProblem, key: Any, number: int) -> Case:
    """A call of few tokens that the same kernel, `key`, answers."""
    unmasked = problem.mask == FULL and problem.q_layout is Layout.DENSE
    queries, keys = min(problem.seqlen_q, PAIRED if unmasked else SHORT), 150
    if not unmasked and getattr(key.cfg, "ctas", 1) == 2 and key.cfg.q_tiles == 2:
        # Under a mask, pairs want queries that see many keys.
        queries, keys = PAIRED, SEEN_KEYS[problem.head_dim] + PAIRED // 2
    dense_q, dense_k = (x is Layout.DENSE for x in (problem.q_layout, problem.kv_layout))
    band = problem.mask if isinstance(problem.mask, Band) else None
    window = (40, 0) if band is not None and band.left is not None else (None, None)
    return Case(
        name=f"packaged {number}",
        seqlens_q=(queries, queries if dense_q else max(queries // 2, 1)),
        seqlens_k=(keys, keys if dense_k else 81),
        used_k=(keys, 81) if dense_k and problem.has_seqused_k else None,
        heads=max(problem.num_heads // problem.num_heads_kv, 2),
        heads_kv=1 if problem.num_heads > problem.num_heads_kv else 2,
        d=problem.head_dim,
        d_v=problem.head_dim_v,
        dtype=problem.dtype,
        layout=LAYOUTS[problem.q_layout, problem.kv_layout],
        page_size=problem.page_size,
        causal=band is not None,
        window=window,
        softcap=problem.softcap,
        sink=problem.has_sink,
        fp8=problem.fp8_kv,
        num_splits=problem.num_splits,
        return_lse=problem.return_lse,
    )


def num_sms(key: Any) -> int:
    """SMs of a card on which `key` answers its small call: some are for few CTAs an SM."""
    return 132 if getattr(key.cfg, "max_load", math.inf) < math.inf else 3


def cases(variant: str) -> dict[Any, Case]:
    """By the key of its kernel, a small call for each attention kernel of a variant."""
    found: dict[Any, Case] = {}
    for problem, key in asked(variant):
        if key not in found:
            found[key] = small_case(problem, key, len(found))
    return found


def questions(key: Any, case: Case) -> list[Case]:
    """Calls for a real card: as small as in the emulator, and as long as people ask.

    Where a small call is one of few CTAs an SM, also of many sequences, which the kernel beside
    `key` that is for many CTAs answers.
    """
    used = case.used_k
    longer = replace(
        case,
        seqlens_k=tuple(8 * n for n in case.seqlens_k),
        used_k=None if used is None else tuple(8 * n for n in used),
    )
    if num_sms(key) == 3:
        return [case, longer]
    many = replace(
        case,
        seqlens_q=MANY * case.seqlens_q,
        seqlens_k=MANY * case.seqlens_k,
        used_k=None if used is None else MANY * used,
    )
    return [case, longer, many]
