"""The torch.library operators, so that torch.compile sees each call as one node.

    forward           (q, k, v, ...) -> (out, lse)             functional, differentiable
    backward          (dout, dlse, out, lse, q, k, v, ...) -> (dq, dk, dv, dsink)
    forward_out       writes out and lse that the caller gave
    with_kvcache      writes k_cache, v_cache, out and lse
    merge             writes the merge of partial results to out and lse

All but the last take the same trailing arguments, `_CALL`, in which AttentionTensors and
AttentionOptions travel flat, and callables as numbers, see `functions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import execute, flops, functions
from ._ops import add_op_namespace_prefix
from .flash_attn4_cute.cache_update import CacheUpdate
from .flash_attn4_cute.mask_rule import FULL
from .flash_attn4_cute.partials import check_apart_from_parts
from .flash_attn4_cute.problem import (
    AttentionOptions,
    AttentionTensors,
    Band,
    Custom,
    band_of,
)

_TENSORS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "Tensor? page_table, Tensor? kv_batch_idx, Tensor? cache_leftpad, Tensor? sink, "
    "Tensor? k_descale, Tensor? v_descale, Tensor? alibi_slopes, Tensor? dropout_state, "
    "Tensor[]? aux_tensors"
)
_OPTIONS = (
    "SymInt? window_left, SymInt? window_right, int mask_mod, int score_mod, "
    "float? softmax_scale, float softcap, float dropout_p, bool deterministic, int num_splits, "
    "bool? pack_gqa, SymInt? max_seqlen_q, SymInt? max_seqlen_k, bool return_lse, "
    "bool requires_grad"
)
_CALL = f"Tensor q, Tensor k, Tensor v, {_TENSORS}, {_OPTIONS}"
_NUM_TENSORS = 3 + _TENSORS.count(",") + 1
_NUM_CALL = _NUM_TENSORS + _OPTIONS.count(",") + 1
_SINK = 10  # position of the sink in _CALL

_UPDATE = (
    "Tensor k_new, Tensor v_new, Tensor cache_seqlens, Tensor? cu_seqlens_k_new, "
    "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"
)


def flatten(tensors: AttentionTensors, options: AttentionOptions) -> tuple:
    """The arguments of one call in the order of `_CALL`."""
    band = band_of(options.mask)
    left, right = (band.left, band.right) if isinstance(band, Band) else (None, None)
    mask_mod = options.mask.mask_mod if isinstance(options.mask, Custom) else None
    aux = tensors.aux_tensors
    return (
        tensors.q,
        tensors.k,
        tensors.v,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        tensors.page_table,
        tensors.kv_batch_idx,
        tensors.cache_leftpad,
        tensors.sink,
        tensors.k_descale,
        tensors.v_descale,
        tensors.alibi_slopes,
        tensors.dropout_state,
        None if aux is None else list(aux),
        left,
        right,
        functions.handle(mask_mod),
        functions.handle(options.score_mod),
        options.softmax_scale,
        options.softcap,
        options.dropout_p,
        options.deterministic,
        options.num_splits,
        options.pack_gqa,
        options.max_seqlen_q,
        options.max_seqlen_k,
        bool(options.return_lse),
        options.requires_grad,
    )


def unflatten(
    call: tuple, has_lse: bool | None = None
) -> tuple[AttentionTensors, AttentionOptions]:
    """The inverse of `flatten`; `has_lse`: whether there is an LSE, whatever the call asks for."""
    q, k, v, cu_q, cu_k, used_q, used_k, table, rows, leftpad = call[:_SINK]
    sink, k_descale, v_descale, alibi, state, aux = call[_SINK:_NUM_TENSORS]
    tensors = AttentionTensors(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        seqused_q=used_q,
        seqused_k=used_k,
        page_table=table,
        kv_batch_idx=rows,
        cache_leftpad=leftpad,
        sink=sink,
        k_descale=k_descale,
        v_descale=v_descale,
        alibi_slopes=alibi,
        dropout_state=state,
        aux_tensors=None if aux is None else tuple(aux),
    )
    left, right, mask_mod, score_mod, scale, softcap, p, deterministic = call[_NUM_TENSORS:][:8]
    num_splits, pack_gqa, max_q, max_k, return_lse, requires_grad = call[_NUM_TENSORS + 8 :]
    band = FULL if left is None and right is None else Band(left, right)
    admit = functions.function_of(mask_mod)
    options = AttentionOptions(
        mask=band if admit is None else Custom(admit, band),
        softmax_scale=scale,
        softcap=softcap,
        score_mod=functions.function_of(score_mod),
        dropout_p=p,
        deterministic=deterministic,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        return_lse=return_lse if has_lse is None else has_lse,
        requires_grad=requires_grad,
    )
    return tensors, options


def flatten_update(update: CacheUpdate) -> tuple:
    """The arguments of one cache update in the order of `_UPDATE`."""
    return (
        update.k,
        update.v,
        update.cache_seqlens,
        update.cu_seqlens_k_new,
        update.rotary_cos,
        update.rotary_sin,
        update.rotary_interleaved,
    )


def _define(name: str, schema: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Decorator: register a function of positional arguments as an operator."""

    def register(function: Callable) -> Any:
        return torch.library.custom_op(
            add_op_namespace_prefix(name), function, mutates_args=mutates, schema=schema
        )

    return register


def result_shapes(call: tuple) -> tuple[list, list]:
    """Shapes of out and lse."""
    q, v, cu_seqlens_q = call[0], call[2], call[3]
    *lengths, heads = q.shape[:-1]
    out = [*q.shape[:-1], v.shape[-1]]
    return out, [*lengths[:-1], heads, lengths[-1]] if cu_seqlens_q is None else [heads, *lengths]


def _has_lse(call: tuple) -> bool:
    """Whether `forward` gives one: the caller wants it, or a gradient will."""
    return_lse, requires_grad = call[-2:]
    return return_lse or requires_grad


@_define("forward", f"({_CALL}) -> (Tensor, Tensor)")
def forward(*call: Any) -> tuple[Tensor, Tensor]:
    """Attention into new tensors; lse is empty if neither the caller nor a gradient needs it."""
    out, lse = execute.attend_again(*unflatten(call, _has_lse(call)))
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


@forward.register_fake
def _(*call: Any) -> tuple[Tensor, Tensor]:
    out, lse = result_shapes(call)
    q = call[0]
    return q.new_empty(out), q.new_empty(lse if _has_lse(call) else 0, dtype=torch.float32)


@_define(
    "backward",
    f"(Tensor dout, Tensor dlse, Tensor out, Tensor lse, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, *call: Any) -> tuple:
    """Gradients of `forward`; dsink is empty without a sink."""
    tensors, options = unflatten(call)
    dq, dk, dv, dsink = execute.differentiate(tensors, options, (out, lse), (dout, dlse))
    return dq, dk, dv, dq.new_empty(0) if dsink is None else dsink


@backward.register_fake
def _(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, *call: Any) -> tuple:
    q, k, v, sink = *call[:3], call[_SINK]
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    return *gradients, q.new_empty(0) if sink is None else torch.empty_like(sink)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.rest = inputs[: _NUM_TENSORS - 1], inputs[_NUM_TENSORS:]
    aux = inputs[_NUM_TENSORS - 1]
    ctx.num_aux = None if aux is None else len(aux)
    ctx.save_for_backward(*output, *tensors, *(aux or ()))
    handles = inputs[_NUM_TENSORS + 2 : _NUM_TENSORS + 4]
    ctx.keep = [functions.function_of(handle) for handle in handles]


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
    out, lse, *saved = ctx.saved_tensors
    tensors, aux = saved[: _NUM_TENSORS - 1], saved[_NUM_TENSORS - 1 :]
    call = (*tensors, None if ctx.num_aux is None else aux, *ctx.rest[:-2], True, True)
    if not _has_lse(ctx.rest):  # a graph that was traced on tensors that need no gradient
        lse = forward(*call)[1]
        dlse = torch.zeros_like(lse)
    dq, dk, dv, dsink = backward(dout, dlse, out, lse, *call)
    gradients: list[Tensor | None] = [dq, dk, dv] + [None] * (_NUM_CALL - 3)
    if tensors[_SINK] is not None:
        gradients[_SINK] = dsink
    return tuple(gradients)


forward.register_autograd(_backward, setup_context=_save_for_backward)


@_define("forward_out", f"(Tensor(a!) out, Tensor(b!)? lse, {_CALL}) -> ()", ("out", "lse"))
def forward_out(out: Tensor, lse: Tensor | None, *call: Any) -> None:
    """Attention into given tensors."""
    tensors, options = unflatten(call, lse is not None)
    tensors.out, tensors.lse = out, lse
    execute.attend_again(tensors, options)


@forward_out.register_fake
def _(out: Tensor, lse: Tensor | None, *call: Any) -> None:
    return None


@_define(
    "with_kvcache",
    f"(Tensor(a!) out, Tensor(b!)? lse, {_UPDATE}, "
    f"{_CALL.replace('Tensor k, Tensor v', 'Tensor(c!) k, Tensor(d!) v')}) -> ()",
    ("out", "lse", "k", "v"),
)
def with_kvcache(out: Tensor, lse: Tensor | None, *arguments: Any) -> None:
    """Append to the cache in place, then attention into given tensors."""
    k, v, cache_seqlens, cu_new, cos, sin, interleaved, *call = arguments
    tensors, options = unflatten(tuple(call), lse is not None)
    tensors.out, tensors.lse = out, lse
    update = CacheUpdate(
        k=k,
        v=v,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k_new=cu_new,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
    )
    execute.attend_again(tensors, options, update)


@with_kvcache.register_fake
def _(out: Tensor, lse: Tensor | None, *arguments: Any) -> None:
    return None


@_define(
    "merge",
    "(Tensor(a!) out, Tensor(b!) lse, Tensor[] outs, Tensor[] lses) -> ()",
    ("out", "lse"),
)
def merge(out: Tensor, lse: Tensor, outs: list[Tensor], lses: list[Tensor]) -> None:
    """Partial results into given tensors, by the kernel of their device."""
    if len(outs) == 1:
        check_apart_from_parts(out, outs[0], lses[0])
    execute.merge(tuple(outs), tuple(lses), out, lse)


@merge.register_fake
def _(out: Tensor, lse: Tensor, outs: list[Tensor], lses: list[Tensor]) -> None:
    return None


flops.formulas.update(
    {
        definition._opoverload.overloadpacket: formula
        for definition, formula in (
            (forward, flops.forward),
            (backward, flops.backward),
            (forward_out, flops.forward_out),
            (with_kvcache, flops.with_kvcache),
        )
    }
)
flops.tell_counters()
