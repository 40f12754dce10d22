"""Which kernels are precompiled: those that answer what transformers and our vLLM plugin ask.

`shipped_calls` has the calls; the plan says which kernel answers each, on each card.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from ..append_plan import AppendKey
from ..combine_plan import CombineKey
from ..compiler import with_target
from ..device import FAMILIES, VARIANTS, Card
from ..plan import plan_on
from ..problem import AttentionProblem
from .shipped_calls import SHIPPED

BF16 = torch.bfloat16
NUM_SMS = 132  # splits are asked for by number; CTAs are few or many on any card
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


def asked(variant: str) -> Iterator[tuple[AttentionProblem, Any]]:
    """The calls that `variant` ships kernels for, each with its kernel's key."""
    capability = next(found for found, name in VARIANTS.items() if name == variant)
    card = Card(variant, capability, NUM_SMS)
    for calls in SHIPPED:
        for problem in calls.problems(FAMILIES[variant]):
            yield problem, with_target(plan_on(problem, card).key)


def shipped_keys(variant: str) -> list[Any]:
    """The keys of the kernels that `variant` is shipped with, in a fixed order, each once."""
    attention = (key for _, key in asked(variant))
    others = map(with_target, (*append_keys(variant), *combine_keys(variant)))
    return list(dict.fromkeys((*attention, *others)))


def all_keys() -> list[Any]:
    """The keys of all variants: what they share is one key."""
    return list(dict.fromkeys(key for name in VARIANTS.values() for key in shipped_keys(name)))


def table() -> list[str]:
    """The lines of README's table: what is precompiled."""
    kinds: dict[str, list[str]] = {}
    for calls in SHIPPED:
        kinds.setdefault(calls.what, []).append(calls.kind())
    dims = ", ".join(map(str, OTHER_DIMS))
    kinds["appending to dense and paged caches"] = [f"{dims}: no rotary tables, those of Llama"]
    kinds["merging, dense and packed"] = [f"{dims}: stacked float32 parts, two bfloat16 results"]
    lines = [f"| {what} | {'<br>'.join(found)} |" for what, found in kinds.items()]
    return ["| calls | head_dim, and what else |", "|---|---|", *lines]
