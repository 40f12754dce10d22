"""Every feature of this repository's kernels on one card, each under several schedules.

A feature is a Case and what answers it; all are judged like a single run.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..findings import EmulationError
from ..session import Session, session
from . import ours
from .case import Case, Inputs, attention, judge, make_inputs

Answer = Callable[[Session, Case, Inputs], tuple[Tensor, Tensor]]
NEW_TOKENS = 5
PARTS = 3


@dataclass(frozen=True)
class Feature:
    """One question, and what answers it."""

    name: str
    case: Case
    answer: Answer = ours.forward


def features() -> Iterator[Feature]:
    """What the kernels do, a question each: few rows decode, many take the forward kernel."""
    rows: dict[str, Any] = {"heads": 2, "kv_heads": 1, "seqlen_q": 140, "seqlen_k": 200}
    chunk: dict[str, Any] = rows | {"seqlen_q": 70, "right": 0}
    step: dict[str, Any] = {
        "batch": 2, "heads": 4, "kv_heads": 2, "seqlen_q": 1, "seqlen_k": 300, "right": 0,
    }  # fmt: skip
    asked: dict[str, dict[str, Any]] = {
        "dense": rows,
        "causal": rows | {"right": 0},
        "window": rows | {"left": 40, "right": 10},
        "softcap_sink": rows | {"softcap": 10.0, "sink": True, "right": 0},
        "varlen": rows | {"varlen": True, "batch": 3, "right": 0},
        "prefill_split": rows | {"num_splits": 3, "right": 0, "sink": True},
        "prefill_paged": chunk | {"page_size": 16},
        "prefill_paged_split": chunk
        | {"page_size": 8, "num_splits": 2, "varlen": True, "batch": 2},
        "decode": step,
        "decode_split": step | {"num_splits": 3, "sink": True, "softcap": 10.0},
        "decode_paged": step | {"page_size": 16},
        "decode_paged_split": step | {"page_size": 64, "num_splits": 4, "seqlen_q": 3},
    }
    for name, options in asked.items():
        yield Feature(name, _case(**options))
    for name, size in (("append", None), ("append_paged", 16)):
        yield Feature(name, _case(**step | {"seqlen_q": NEW_TOKENS, "page_size": size}), append)
    yield Feature("combine", _case(**rows | {"seqlen_q": 9}), combine)


def _case(**options: Any) -> Case:
    """bf16, d 64 unless said otherwise."""
    defaults: dict[str, Any] = {
        "dtype": torch.bfloat16, "batch": 1, "head_dim": 64, "head_dim_v": 64,
    }  # fmt: skip
    return Case(**(defaults | options))


def append(emulator: Session, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The last NEW_TOKENS keys are new: NaN in the cache until the append kernel writes them."""
    from flash_attn4_cute import append_plan
    from flash_attn4_cute.cache_update import CacheUpdate

    old = case.seqlen_k - NEW_TOKENS
    before = torch.full((case.batch,), old, dtype=torch.int32)
    new = [x[:, old:].clone() for x in (inputs.k, inputs.v)]
    blank = Inputs(**vars(inputs) | {"k": inputs.k.clone(), "v": inputs.v.clone()})
    for x in (blank.k, blank.v):
        x[:, old:] = torch.nan
    tensors = ours.tensors_of(case, blank)
    tensors.seqused_k = before
    problem = ours.problem_of(case, tensors)
    with ours.kernels_on(emulator) as launch:
        update = CacheUpdate(k=new[0], v=new[1], cache_seqlens=before)
        append_plan.append(update, tensors, True)
        launch(problem, tensors)
    return tensors.out, tensors.lse


def combine(emulator: Session, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The merge of exact results over PARTS thirds of the keys."""
    combine_plan = importlib.import_module("flash_attn4_cute.combine_plan")
    q, k, v = (x[0].double() for x in (inputs.q, inputs.k, inputs.v))
    parts = [
        attention(case, q, keys, values, None)
        for keys, values in zip(k.tensor_split(PARTS), v.tensor_split(PARTS), strict=True)
    ]
    outs, lses = (torch.stack(x).float()[:, None] for x in zip(*parts, strict=True))
    out = inputs.q.new_full(outs.shape[1:], torch.nan)
    lse = torch.full(lses.shape[1:], torch.nan)
    with ours.kernels_on(emulator):
        combine_plan.merge((outs,), (lses,), out, lse)
    return out, lse


def run(arch: str, schedules: int, only: str | None = None) -> tuple[bool, dict[str, Any]]:
    """Print a line a feature; (whether all is right, what to report)."""
    wrong, runs, instructions, began = [], 0, 0, time.monotonic()
    chosen = [f for f in features() if only is None or f.name in only.split(",")]
    for feature in chosen:
        inputs, worst, started = make_inputs(feature.case), 0.0, time.monotonic()
        for schedule in range(schedules):
            with session(arch, schedule, strict=True) as emulator:
                try:
                    verdict = judge(
                        feature.case, inputs, *feature.answer(emulator, feature.case, inputs)
                    )
                    problem = None if verdict.ok else f"wrong by {verdict.max_abs_err}"
                    worst = max(worst, verdict.max_abs_err / max(verdict.limit, 1e-30))
                except EmulationError as error:
                    problem = str(error)
            runs, instructions = runs + 1, instructions + emulator.instructions
            if problem is not None:
                wrong.append({"feature": feature.name, "schedule": schedule, "problem": problem})
        print(
            f"{feature.name:20} {schedules} schedules, largest error {worst:.2f} of what is "
            f"allowed, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    ok = not wrong and runs > 0
    report = {
        "ok": ok,
        "arch": arch,
        "features": len(chosen),
        "schedules": schedules,
        "runs": runs,
        "instructions": instructions,
        "seconds": round(time.monotonic() - began),
        "wrong": wrong,
    }
    return ok, report
