"""From a Case to a call of the kernel as a user makes it, to a verdict.

build(case, device) -> Call --run--> Answer --judge--> AssertionError or nothing
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from . import acceptance, inputs
from .cases import FP8, Case
from .oracle import Dropout, Rule

DROPOUT_SEED = 5


@dataclass
class Call:
    """The tensors of one call, and the sequences that they hold as the oracle takes them."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule
    sequences: tuple[list[Tensor], list[Tensor], list[Tensor]]
    tensors: dict[str, Any] = field(default_factory=dict)  # lengths, tables: beside q, k, v

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every public function shares, where they are not default."""
        case, rule = self.case, self.rule
        given = {
            "causal": (case.causal, False),
            "window_size": (case.window, (None, None)),
            "softcap": (case.softcap, 0.0),
            "softmax_scale": (case.softmax_scale, None),
            "num_splits": (case.num_splits, 0),
            "pack_gqa": (case.pack_gqa, None),
            "dropout_p": (case.dropout_p, 0.0),
        }
        options = {name: value for name, (value, default) in given.items() if value != default}
        if rule.sink is not None:
            options["s_aux"] = rule.sink
        if rule.alibi_slopes is not None:
            options["alibi_slopes"] = rule.alibi_slopes
        return options


@dataclass(frozen=True)
class Answer:
    """What came back, sequence by sequence: outs (n, h, d_v), lses (h, n) or None."""

    outs: list[Tensor]
    lses: list[Tensor] | None


def drawn_dropout(p: float, device: torch.device) -> Dropout:
    """What a call draws after torch.manual_seed(DROPOUT_SEED)."""
    torch.manual_seed(DROPOUT_SEED)
    seed, offset = torch.randint(2**63 - 1, (2,), device=device).tolist()
    return Dropout(p, seed, offset)


def make_rule(case: Case, device: torch.device) -> Rule:
    gen = inputs.generator(case, device)
    sink = slopes = None
    if case.sink:
        sink = torch.randn(case.heads, generator=gen, device=device).to(case.dtype)
    if case.alibi:
        shape = (case.heads,) if case.alibi == "head" else (case.batch, case.heads)
        slopes = torch.rand(shape, generator=gen, device=device) * 0.3
    return Rule(
        causal=case.causal,
        window=case.window,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        sink=sink,
        alibi_slopes=slopes,
        dropout=drawn_dropout(case.dropout_p, device) if case.dropout_p else None,
    )


def build(case: Case, device: torch.device) -> Call:
    """The tensors of this case, and what the oracle needs."""
    all_q, all_k, all_v = inputs.draw(case, device)
    extra: dict[str, Any] = {}
    cached = case.dtype
    if case.fp8:
        # Small enough for e4m3 to hold what normal inputs are divided by them.
        gen, shape = inputs.generator(case, device), (2, case.batch, case.heads_kv)
        factors = torch.rand(shape, generator=gen, device=device) * 0.02 + 0.005
        extra |= {"k_descale": factors[0], "v_descale": factors[1]}
        held = map(inputs.quantised, (all_k, all_v), factors)
        all_k, all_v = (inputs.repeated(case, xs) for xs in held)
        cached = FP8
    qs, all_q = inputs.keep_used(all_q, case.used_q)
    ks, all_k = inputs.keep_used(all_k, case.used_k)
    vs, all_v = inputs.keep_used(all_v, case.used_k)
    d_v = case.d_v or case.d
    join_q = inputs.stack if case.has_dense_q else inputs.pack
    q = join_q(all_q, (case.heads, case.d), case.dtype, device)
    if case.layout.startswith("paged"):
        counts = [len(x) for x in ks]
        pages, total = inputs.shuffled_pages(counts, case.page_size, inputs.generator(case, device))
        k, v = (inputs.fill_pages(xs, pages, total, case.page_size) for xs in (ks, vs))
        width = max(map(len, pages)) + 2
        extra["block_table"] = inputs.page_table(pages, width, device)
        extra["seqused_k"] = inputs.int32(case.used_k or counts, device)
    else:
        join = inputs.stack if case.has_dense_k else inputs.pack
        k = join(all_k, (case.heads_kv, case.d), cached, device)
        v = join(all_v, (case.heads_kv, d_v), cached, device)
        if case.used_k is not None:
            extra["seqused_k"] = inputs.int32(case.used_k, device)
    if not case.has_dense_q:
        extra["cu_seqlens_q"] = inputs.cumulative(all_q, device)
        extra["max_seqlen_q"] = max(case.seqlens_q, default=0)
    if case.layout in ("varlen", "packed_k"):
        extra["cu_seqlens_k"] = inputs.cumulative(all_k, device)
        extra["max_seqlen_k"] = max(case.seqlens_k, default=0)
    if case.used_q is not None:
        extra["seqused_q"] = inputs.int32(case.used_q, device)
    q, k, v = inputs.PLACEMENTS[case.strides](q, k, v)
    if case.fp8:
        ks, vs = map(inputs.dequantised, (ks, vs), factors)
    return Call(case, q, k, v, make_rule(case, device), (qs, ks, vs), extra)


# --- Call -> Answer -------------------------------------------------------------------------------


def call_dense(fa4: ModuleType, call: Call, **options: Any) -> Any:
    return fa4.flash_attn_func(call.q, call.k, call.v, **options)


def call_varlen(fa4: ModuleType, call: Call, **options: Any) -> Any:
    named = dict(call.tensors)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    positional = [named.pop(name, None) for name in names]
    return fa4.flash_attn_varlen_func(call.q, call.k, call.v, *positional, **named, **options)


def call_kvcache(fa4: ModuleType, call: Call, **options: Any) -> Any:
    named = dict(call.tensors)
    named["cache_seqlens"] = named.pop("seqused_k", None)
    return fa4.flash_attn_with_kvcache(call.q, call.k, call.v, **named, **options)


def caller(case: Case) -> Callable[..., Any]:
    """The public function that answers this layout."""
    if case.layout == "paged_dense":
        return call_kvcache
    if case.layout == "dense" and case.used_q is None and case.used_k is None:
        # The function for dense tensors takes no factors, that for caches no dropout.
        with_factors = call_varlen if case.dropout_p else call_kvcache
        return with_factors if case.fp8 else call_dense
    return call_varlen


def cut(call: Call, out: Tensor, lse: Tensor | None) -> Answer:
    """The rows of each sequence that count. lse: (b, h, sq), or (h, total_q) for packed q."""
    counts = [len(x) for x in call.sequences[0]]
    if out.ndim == 4:
        outs = [out[b, :n] for b, n in enumerate(counts)]
        return Answer(outs, None if lse is None else [lse[b, :, :n] for b, n in enumerate(counts)])
    starts = call.tensors["cu_seqlens_q"].tolist()[:-1]
    spans = [slice(a, a + n) for a, n in zip(starts, counts, strict=True)]
    return Answer([out[s] for s in spans], None if lse is None else [lse[:, s] for s in spans])


def run_uncut(fa4: ModuleType, call: Call, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """Call the kernel -> (out, lse); `changes` replace or add keyword arguments."""
    options = call.options | {"return_lse": call.case.return_lse} | changes
    if call.case.dropout_p:
        torch.manual_seed(DROPOUT_SEED)
    result = caller(call.case)(fa4, call, **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert (lse is not None) == options["return_lse"]
    return out, lse


def run(fa4: ModuleType, call: Call, **changes: Any) -> Answer:
    """The same, cut into sequences. Waits for a GPU; run_uncut does not."""
    return cut(call, *run_uncut(fa4, call, **changes))


# --- Answer -> verdict ----------------------------------------------------------------------------


def judge(call: Call, answer: Answer) -> None:
    """Every sequence against the oracle, by acceptance's rule."""
    for b, (q, k, v) in enumerate(zip(*call.sequences, strict=True)):
        ref = acceptance.reference(q, k, v, call.rule, b)
        lse = None if answer.lses is None else answer.lses[b]
        acceptance.check(answer.outs[b], lse, ref, f"{call.case.name}, sequence {b}")


def verify(fa4: ModuleType, case: Case, device: torch.device) -> None:
    """The whole way; on a GPU, what its kernels lack must be refused by the argument's name."""
    call = build(case, device)
    missing = case.missing_on_gpu() if device.type == "cuda" else None
    if missing is None:
        judge(call, run(fa4, call))
        return
    with pytest.raises(NotImplementedError, match=missing):
        run(fa4, call)


def same_bits(a: Answer, b: Answer) -> bool:
    """Whether two answers are equal bit for bit."""
    outs = all(torch.equal(x, y) for x, y in zip(a.outs, b.outs, strict=True))
    if a.lses is None or b.lses is None:
        return outs
    return outs and all(torch.equal(x, y) for x, y in zip(a.lses, b.lses, strict=True))
