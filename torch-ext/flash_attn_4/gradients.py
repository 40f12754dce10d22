"""There are gradients for q, k, v and s_aux: what else requires grad is refused, not forgotten."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .flash_attn4_cute.checks import refuse
from .flash_attn4_cute.problem import AttentionOptions, AttentionTensors
from .functions import function_of

_WITHOUT = ("alibi_slopes", "k_descale", "v_descale", "out", "lse")
_DEPTH = 3  # how far the tensors of a function are looked for


def needs_grad(*tensors: Any) -> bool:
    """Whether autograd has to record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def check_gradients(tensors: AttentionTensors, options: AttentionOptions) -> None:
    """Refuse what would lose its gradient, if gradients are recorded.

    Raises:
        NotImplementedError: a tensor that requires grad, given or read by score_mod. (What mask_mod
            says has no gradient.)
    """
    if not torch.is_grad_enabled():
        return
    named = [(name, getattr(tensors, name)) for name in _WITHOUT]
    named += [(f"aux_tensors[{i}]", t) for i, t in enumerate(tensors.aux_tensors or ())]
    for name, t in named:
        if needs_grad(t):
            raise refuse(
                NotImplementedError,
                name,
                "a tensor that requires grad",
                "gradients are provided for q, k, v and s_aux only",
                f"Pass {name}.detach(), or call under torch.no_grad()",
            )
    score_mod = options.score_mod
    if score_mod is None:
        return
    if is_dynamo_compiling():  # which alone knows the function itself
        from torch._dynamo.comptime import comptime

        comptime(_look_at_traced)
        forgets, value = _forgets(), "a function"
    else:
        forgets, value = needs_grad(*_read_by(score_mod)), repr(score_mod)
    if forgets:
        raise refuse(
            NotImplementedError,
            "score_mod",
            value,
            "reads a tensor that requires grad, and has no gradient",
            "Detach that tensor, or call under torch.no_grad()",
        )


_forgotten = False  # whether the function that Dynamo met last reads a tensor that requires grad


def _look_at_traced(context: Any) -> None:
    global _forgotten
    from .traced_functions import settle

    _forgotten = needs_grad(*_read_by(function_of(settle(context, "score_mod"))))


def _forgets() -> bool:
    return _forgotten


# What torch.compiler.assume_constant_result does, which imports torch._dynamo.
_forgets._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _read_by(x: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors in `x`, a function or what one reads, as far as they are in plain sight."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, torch.nn.Module):
        yield from x.parameters()
    elif depth:
        for part in _parts(x):
            yield from _read_by(part, depth - 1)


def _parts(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple)):
        yield from x
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, types.MethodType):
        yield from (x.__func__, vars(x.__self__) if hasattr(x.__self__, "__dict__") else None)
    elif isinstance(x, types.FunctionType):
        yield from (x.__defaults__, x.__kwdefaults__)
        yield from (x.__globals__.get(name) for name in x.__code__.co_names)
        for cell in x.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    elif callable(x) and not isinstance(x, type):
        yield getattr(x, "__dict__", None)
