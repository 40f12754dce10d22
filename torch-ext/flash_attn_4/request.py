"""From the ecosystem's keyword arguments to AttentionTensors and AttentionOptions, and on its way.

Aliases are resolved here and nowhere else; below this file each thing has one name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from . import execute, ops
from .execute import repeats
from .flash_attn4_cute.cache_update import CacheUpdate, names_of_keys, tensors_of
from .flash_attn4_cute.checks import check_is_tensor, is_bound_on_device, plain, refuse
from .flash_attn4_cute.problem import (
    OTHERS,
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    make_mask_rule,
    others_of,
)
from .flash_attn4_cute.repeat import Others, key_of, kind_of, planned_bound
from .flash_attn4_cute.results import has_rows_of_no_sequence, new_lse, new_out
from .flash_attn4_cute.scheduler_metadata import SchedulerMetadata, with_metadata
from .flash_attn4_cute.watchers import (
    are_plain,
    check_level,
    check_strided,
    check_tangents,
    check_transforms,
    is_watched,
)
from .flops import tell_counters
from .gradients import check_gradients, needs_grad

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


# What a call asks for except max_seqlen_k: causal, window_size, mask_mod; `_FIELDS` of
# AttentionOptions; scheduler_metadata.
Asked = tuple[Any, ...]
_FIELDS = (
    "softmax_scale",
    "softcap",
    "score_mod",
    "dropout_p",
    "deterministic",
    "num_splits",
    "pack_gqa",
    "max_seqlen_q",
    "return_lse",
)
# Of what may be kept: it neither changes nor keeps anything alive.
_PLAIN_TYPES = frozenset({bool, int, float, type(None), SchedulerMetadata})


_MAX_SEQLEN_Q = 3 + _FIELDS.index("max_seqlen_q")


def _made_plain(asked: Asked, longest: Any) -> tuple[Asked, Any] | None:
    """The same in Python's own numbers and tuples, so that it may be kept; None if it cannot be."""
    found = list(asked)
    window, found[1] = found[1], None
    if not _PLAIN_TYPES.issuperset(map(type, found)):
        found = [x if type(x) in _PLAIN_TYPES else plain(x) for x in found]
        if type(found[_MAX_SEQLEN_Q]) is Tensor and is_bound_on_device(found[_MAX_SEQLEN_Q]):
            found[_MAX_SEQLEN_Q] = None
        if not _PLAIN_TYPES.issuperset(map(type, found)):
            return None
    if window is not None:
        if type(window) is not tuple and type(window) is not list:
            return None
        found[1] = tuple(window)
        if not _PLAIN_TYPES.issuperset(map(type, window)):
            found[1] = tuple(map(plain, window))
            if not _PLAIN_TYPES.issuperset(map(type, found[1])):
                return None
    if type(longest) not in _PLAIN_TYPES:
        longest = None if is_bound_on_device(longest) else plain(longest)
        if type(longest) not in _PLAIN_TYPES:
            return None
    return tuple(found), longest


def ask(
    asked: Asked,
    longest: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    others: Others,
    aux: Sequence[Tensor] | None = None,
    interleaved: bool | None = None,
    check: Callable[[Tensor, tuple], None] | None = None,
) -> tuple[Tensor, Any]:
    """(out, lse) of a flat call, see `repeat`: the short way if it was made before.

    `longest` is max_seqlen_k. `aux` are tensors for a user's functions. `check` is left out where
    the same call has passed it before.
    """
    key = None
    if aux is None and not is_dynamo_compiling():
        kind: Any = asked if others is None else kind_of(asked, longest, others, interleaved)
        try:
            last = repeats.last.get(kind)
        except TypeError:  # a list, say
            last = None
        if last is None:
            made = _made_plain(asked, longest)
            if made is None:
                return send(*unpacked(qkv, others, aux, interleaved, check), asked, longest)
            asked, longest = made
            bound = planned_bound(longest, others or ())
            kind = asked if others is None else (asked, bound, *kind[2:])
            last = repeats.last.get(kind)
        if last is not None:
            likeness, known = last
            if likeness.holds(qkv if others is None else qkv + others):
                found = known.again(qkv, others)
                if found is not None:
                    return found
        key = key_of(asked, longest, qkv, others, interleaved)
        found = repeats.again(key, kind, qkv, others)
        if found is not None:
            return found
    return send(*unpacked(qkv, others, aux, interleaved, check), asked, longest, key)


def unpacked(
    qkv: tuple[Tensor, Tensor, Tensor],
    others: Others,
    aux: Sequence[Tensor] | None,
    interleaved: bool | None,
    check: Callable[[Tensor, tuple], None] | None,
) -> tuple[AttentionTensors, CacheUpdate | None]:
    """The tensors of a flat call by their names, after its own `check`."""
    q, k, v = qkv
    given: tuple[Any, ...] = (None,) * len(OTHERS) if others is None else others
    if check is not None:
        check(q, given)
    # As many as names: torch.compile of PyTorch 2.9 takes zip to be strict.
    named = dict(zip(OTHERS, given[: len(OTHERS)], strict=True))
    tensors = AttentionTensors(q=q, k=k, v=v, **named)
    tensors.aux_tensors = None if aux is None else tuple(aux)
    if interleaved is None:
        return tensors, None
    k_new, v_new, lengths, cu_new, cos, sin = given[len(OTHERS) :]
    return tensors, CacheUpdate(k_new, v_new, lengths, cu_new, cos, sin, interleaved)


def options_of(asked: Asked, longest: Any, requires_grad: bool) -> AttentionOptions:
    """What is asked, checked and in canonical form."""
    causal, window, mask_mod, *values, _ = asked
    return AttentionOptions(
        mask=make_mask_rule(causal, window, mask_mod),
        max_seqlen_k=longest,
        requires_grad=requires_grad,
        **dict(zip(_FIELDS, values, strict=True)),
    )


_kept_options_of = functools.lru_cache(maxsize=1024)(options_of)  # of what may be kept


def resolved(
    tensors: AttentionTensors, asked: Asked, longest: Any, keep: bool = False
) -> AttentionOptions:
    """The options of a call, with what its tensors and its metadata decide."""
    grad = needs_grad(tensors.q, tensors.k, tensors.v, tensors.sink)
    options = (_kept_options_of if keep else options_of)(asked, longest, grad)
    if asked[-1] is not None:
        options = with_metadata(asked[-1], tensors, options)
    check_gradients(tensors, options)
    return options


def send(
    tensors: AttentionTensors,
    update: CacheUpdate | None,
    asked: Asked,
    longest: Any,
    key: tuple | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse): through an operator where torch must see one, else straight to the variant.

    Autograd records no call that writes into a cache, whatever requires grad. Only what may be kept
    has a `key`. Without one, the call may still be known by its options in canonical form.
    """
    q = tensors.q
    if update is not None and torch.is_grad_enabled():
        with torch.no_grad():
            return send(tensors, update, asked, longest, key)
    options = resolved(tensors, asked, longest, key is not None)
    if options.dropout_p and isinstance(q, Tensor):
        tensors.dropout_state = torch.randint(2**63 - 1, (2,), device=q.device)
    if is_for_operators(tensors, options, update):
        return _through_operator(tensors, options, update)
    if key is None:
        return execute.attend_again(tensors, options, update)
    return execute.attend(tensors, options, update, key)


def is_for_operators(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None
) -> bool:
    """Whether a call goes through an operator; raises what neither way can take."""
    if is_compiling():
        check_level()
        found = isinstance(tensors.q, Tensor)
    elif _is_seen(tensors, update):
        if options.requires_grad:
            check_transforms()
        found = True
    else:
        found = options.requires_grad and update is tensors.out is tensors.lse is None
        if found:
            AttentionProblem.from_tensors(tensors, options)  # before an operator's schema complains
    if found and tensors.blocks is not None:
        raise refuse(
            NotImplementedError,
            "block_sparse_tensors",
            "given",
            "no operator of PyTorch stands for the call, which torch.compile, dispatch modes and "
            "subclasses of Tensor need",
            "Call it outside of the compiled function, or express the mask by mask_mod",
        )
    return found


def _is_seen(tensors: AttentionTensors, update: CacheUpdate | None) -> bool:
    """Whether PyTorch's dispatcher must see a call that runs at once."""
    names: tuple[str, ...] = ("q", *names_of_keys(update), *OTHERS)
    given = (tensors.q, tensors.k, tensors.v, *others_of(tensors))
    if update is not None:
        names += CacheUpdate.__slots__
        given += tensors_of(update)
    check_strided(names, given)
    check_tangents(names, given)
    given += tensors.aux_tensors or ()
    for t in given:
        if t is not None and not isinstance(t, Tensor):
            return False  # as the checks will say
    if is_watched():
        tell_counters()
        return True
    return not are_plain(given)


def _through_operator(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None
) -> tuple[Tensor, Tensor | None]:
    call = ops.flatten(tensors, options)
    if update is None and tensors.out is None and tensors.lse is None:
        out, lse = ops.forward(*call)
        return out, lse if options.return_lse else None
    q, out, lse = tensors.q, tensors.out, tensors.lse
    out_shape, lse_shape = ops.result_shapes(call)
    cleared = has_rows_of_no_sequence(tensors)
    if out is None:
        out = new_out(q, out_shape, cleared)
    if lse is None and options.return_lse:
        lse = new_lse(q, lse_shape, cleared)
    if update is None:
        ops.forward_out(out, lse, *call)
    else:
        ops.with_kvcache(out, lse, *ops.flatten_update(update), *call)
    return out, lse
