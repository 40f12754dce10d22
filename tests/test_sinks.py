"""Sinks where there are no keys: the softmax over the sink alone, out = 0 and LSE = sink.

So parts of the keys of which one has the sink merge to the result over all of them, also for the
queries that see nothing of that part.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from . import acceptance, harness
from .cases import BF16, F16, F32, Case
from .oracle import Rule

HOLES = {
    "layout": "varlen",
    "seqlens_q": (0, 70, 3, 0, 150, 1),
    "seqlens_k": (9, 0, 0, 70, 90, 3),
}
NO_KEYS = {"seqlens_q": (5, 5), "seqlens_k": (0, 0)}
USED = {"seqlens_q": (70,) * 3, "seqlens_k": (40,) * 3, "used_k": (33, 0, -1)}
STEP = {"seqlens_q": (1,) * 4, "seqlens_k": (160,) * 4, "used_k": (130, 0, -1, 3)}
PAGES = {"layout": "paged", "page_size": 16, **STEP}

SIZES = {"d": 64, "heads": 2, "heads_kv": 1}
KINDS: dict[str, dict] = {
    # The kernel for many rows: rows in front of the diagonal, sequences and windows without keys.
    "dense": {"seqlens_q": (150,), "seqlens_k": (70,), "causal": True},
    "whole_tiles": {"seqlens_q": (600,), "seqlens_k": (40,), "causal": True},
    "varlen": {**HOLES, "causal": True},
    "window": {**HOLES, "window": (20, 5)},
    "used": {**USED, "causal": True},
    "used_q": {**USED, "used_q": (70, 9, 2), "causal": True, "layout": "varlen"},
    "split": {"seqlens_q": (66, 66), "seqlens_k": (140,) * 2, "used_k": (140, 0), "num_splits": 3},
    # No key of any sequence: no kernel runs.
    "no_keys": NO_KEYS,
    "no_keys_varlen": {**NO_KEYS, "layout": "varlen"},
    "no_keys_used_q": {**NO_KEYS, "layout": "varlen", "used_q": (2, -1)},
    # The kernel for few rows.
    "decode": STEP,
    "decode_split": {**STEP, "num_splits": 3},
    "decode_pages": {**PAGES, "window": (60, 0), "num_splits": 1},
    "decode_pages_split": {**PAGES, "num_splits": 2, "causal": True},
}
CASES = [
    Case(name=name, sink=True, dtype=(BF16, F16)[i % 2], **SIZES, **given)
    for i, (name, given) in enumerate(KINDS.items())
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_without_keys(fa4, device, case):
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_a_sink_of_minus_infinity_is_none(fa4, device, layout):
    """exp(-inf) = 0 adds nothing: the result of a call without, LSE = -inf without keys."""
    case = Case(name="no_sink", d=64, layout=layout, causal=True, seqlens_q=(90,), seqlens_k=(40,))
    call = harness.build(case, device)
    sink = torch.full((case.heads,), -math.inf, dtype=case.dtype, device=device)
    harness.judge(call, harness.run(fa4, call, s_aux=sink))


@pytest.mark.parametrize("splits, queries", [*product((1, 2), (1, 80))])
def test_scores_of_minus_infinity_leave_the_sink(fa4, device, splits, queries):
    """Keys that are seen and weigh nothing."""
    case = Case(
        name="all_minus_inf", d=64, seqlens_q=(queries,), seqlens_k=(70,), sink=True,
        fill="minus_inf", num_splits=splits,
    )  # fmt: skip
    call = harness.build(case, device)
    call.k[..., 0] = -math.inf
    call.sequences = tuple([x[0]] for x in (call.q, call.k, call.v))
    answer = harness.run(fa4, call)
    harness.judge(call, answer)
    expected = call.rule.sink.float()[:, None].expand(case.heads, queries)
    assert torch.equal(answer.lses[0], expected)


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_parts_of_which_one_has_the_sink(fa4, device, owner):
    """Context parallelism: causal attention over thirds of the keys, merged in turn."""
    dtype = F32 if device.type == "cpu" else BF16
    length, ends = 96, (0, 32, 64, 96)
    case = Case(
        name="ring", d=64, dtype=dtype, seqlens_q=(length,), seqlens_k=(length,), causal=True,
        sink=True,
    )  # fmt: skip
    call = harness.build(case, device)
    states = []
    for i, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        # Query i sees keys up to its own: `length - end` beyond where the part's last query stands.
        states.append(
            fa4.flash_attn_func(
                call.q,
                call.k[:, begin:end],
                call.v[:, begin:end],
                window_size=(None, length - end),
                s_aux=call.rule.sink if i == owner else None,
                return_lse=True,
            )
        )
    out, lse = fa4.merge_attention_states(*states[0], *states[1])
    out, lse = fa4.merge_attention_states(out, lse, *states[2])
    q, k, v = (x[0] for x in (call.q, call.k, call.v))
    ref = acceptance.reference(q, k, v, Rule(causal=True, sink=call.rule.sink))
    # Parts are rounded, and what is merged is rounded twice.
    roundings = 3 * torch.finfo(dtype).eps
    acceptance.check(out[0], lse[0], ref, f"sink in part {owner}", truncation=roundings)


def cases_without_keys() -> list[Case]:
    base = Case(name="nothing", dtype=F32, d=16, sink=True, **NO_KEYS)
    packed = replace(base, layout="varlen")
    used = replace(base, seqlens_k=(7, 7), used_k=(0, -1))
    return [base, packed, used, replace(used, layout="varlen")]


def test_the_sinks_gradient_where_there_are_no_keys(fa4):
    """LSE = sink there: all of the LSE's gradient is the sink's."""
    for given in cases_without_keys():
        call = harness.build(given, torch.device("cpu"))
        sink = call.rule.sink.clone().requires_grad_()
        _, lse = harness.run_uncut(fa4, call, s_aux=sink)
        weights = torch.arange(lse.numel(), dtype=torch.float32).view(lse.shape)
        (grad,) = torch.autograd.grad((lse * weights).sum(), sink)
        rows = tuple(i for i in range(lse.dim()) if i != lse.dim() - 2)
        assert torch.equal(grad, weights.sum(rows))
