"""From the ecosystem's keyword arguments to AttentionTensors and AttentionOptions, and on its way.

Aliases are resolved here and nowhere else; below this file each thing has one name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import execute, ops
from .flash_attn4_cute.cache_update import CacheUpdate
from .flash_attn4_cute.checks import check_is_tensor, refuse
from .flash_attn4_cute.problem import (
    OTHERS,
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    make_mask_rule,
    numbered,
)
from .flash_attn4_cute.repeat import New, Others, key_of
from .flash_attn4_cute.scheduler_metadata import with_metadata

Result = Tensor | tuple[Tensor, Tensor]
Window = Sequence[int | None] | None


def one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    """The one that is given of an argument and its alias; None if neither."""
    if other is None:
        return value
    if value is None:
        return other
    raise refuse(
        ValueError,
        f"{name}, {alias}",
        "both given",
        "they are two names of one argument",
        f"Pass only {name}",
    )


def key_lengths(
    page_table: Tensor | None, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(cu_seqlens_k, seqused_k): with pages, FlashAttention-2 callers say lengths by the former."""
    if page_table is None or cu_seqlens_k is None or seqused_k is not None:
        return cu_seqlens_k, seqused_k
    check_is_tensor("cu_seqlens_k", cu_seqlens_k)
    return None, cu_seqlens_k.diff()


_known_options: dict[tuple, AttentionOptions] = {}
_MAX_OPTIONS = 1024
_FIELDS = tuple(field.name for field in dataclasses.fields(AttentionOptions))[1:-1]
_PLAIN_TYPES = frozenset({bool, int, float, type(None)})


def options_of(mask: tuple, *values: Any) -> AttentionOptions:
    """AttentionOptions of (causal, window_size, mask_mod) and, in order, its other fields.

    Calls repeat few combinations, so that checking them each time is worth avoiding.
    """
    if is_compiling():  # a number that changes must not become part of a graph
        return _new_options(mask, values)
    try:
        found = _known_options.get((mask, values))
    except TypeError:  # a list, say
        found = None
    if found is None:
        found = numbered(_new_options(mask, values))
        causal, window, mask_mod = mask
        plain = (causal, mask_mod, *(window or ()), *values)
        if found.number and _PLAIN_TYPES.issuperset(map(type, plain)) and type(window) is tuple:
            if len(_known_options) >= _MAX_OPTIONS:
                _known_options.clear()
            _known_options[mask, values] = found
    return found


def _new_options(mask: tuple, values: tuple) -> AttentionOptions:
    fields = dict(zip(_FIELDS, values, strict=True))
    return AttentionOptions(mask=make_mask_rule(*mask), **fields)


def needs_grad(*tensors: Any) -> bool:
    """Whether autograd has to record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def ask(
    options: AttentionOptions,
    metadata: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    others: Others = None,
    new: New = None,
    check: Callable[[Tensor, Any, New], None] | None = None,
    aux: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """(out, lse) of a flat call, see `repeat`: the short way if it was made before.

    `metadata` is what get_scheduler_metadata returned. `check` is left out where the same call has
    passed it before. `aux` are tensors for a user's functions.
    """
    key = None if aux is not None else key_of(options, metadata, qkv, others, new)
    known = None if key is None else execute.repeats.get(key)
    if known is not None:
        return known(qkv, others, new)
    q, k, v = qkv
    if check is not None:
        check(q, others, new)
    named: dict[str, Any] = {} if others is None else dict(zip(OTHERS, others, strict=True))
    tensors = AttentionTensors(q=q, k=k, v=v, **named)
    tensors.aux_tensors = None if aux is None else tuple(aux)
    update = None if new is None else CacheUpdate(*new)
    return send(tensors, options, metadata, update, key)


def send(
    tensors: AttentionTensors,
    options: AttentionOptions,
    metadata: Any,
    update: CacheUpdate | None = None,
    key: tuple | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse): through an operator where torch must see one, else straight to the variant."""
    q = tensors.q
    if metadata is not None:
        options = with_metadata(metadata, tensors, options)
    if options.dropout_p and isinstance(q, Tensor):
        tensors.dropout_state = torch.randint(2**63 - 1, (2,), device=q.device)
    if is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        if isinstance(q, Tensor):
            return _through_operator(tensors, options, update)
    elif options.requires_grad and update is None and tensors.out is None and tensors.lse is None:
        AttentionProblem.from_tensors(tensors, options)  # before the operator's schema complains
        return _through_operator(tensors, options, None)
    return execute.attend(tensors, options, update, key)


def _through_operator(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None
) -> tuple[Tensor, Tensor | None]:
    if tensors.blocks is not None:
        raise refuse(
            NotImplementedError,
            "block_sparse_tensors",
            "given",
            "the call cannot be compiled by torch.compile",
            "Call it outside of the compiled function, or express the mask by mask_mod",
        )
    call = ops.flatten(tensors, options)
    if update is None and tensors.out is None and tensors.lse is None:
        out, lse = ops.forward(*call)
        return out, lse if options.return_lse else None
    q = tensors.q
    out_shape, lse_shape = ops.result_shapes(call)
    out = q.new_empty(out_shape) if tensors.out is None else tensors.out
    lse = tensors.lse
    if lse is None and options.return_lse:
        lse = q.new_empty(lse_shape, dtype=torch.float32)
    if update is None:
        ops.forward_out(out, lse, *call)
    else:
        ops.with_kvcache(out, lse, *ops.flatten_update(update), *call)
    return out, lse
