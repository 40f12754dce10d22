"""There are gradients for q, k, v and s_aux: what else requires grad is refused, not forgotten."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
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
_DEPTH = 3  # how many functions that call each other are looked at
_OF_MODULES = ("_parameters", "_buffers", "_modules")  # where torch.nn.Module has its attributes
_DETACHED = frozenset(  # attributes of a tensor that have no gradient
    {"data", "device", "dim", "dtype", "item", "ndim", "numel", "requires_grad", "shape", "size"}
    | {"tolist"}
)
_DETACHING = frozenset({"detach", "detach_", "no_grad", "inference_mode"})


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


def _read_by(function: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors that a function reads, as far as its code shows: others pass."""
    if isinstance(function, torch.nn.Module):  # whose submodules are called, and read theirs
        yield from function.parameters()
        return
    function, given, keywords = _bound(function)
    if not isinstance(function, types.FunctionType):
        return
    code = function.__code__
    if not _DETACHING.isdisjoint(code.co_names):  # it knows, and what of it is hard to tell
        return
    variables = dict(function.__kwdefaults__ or {})
    arguments, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
    variables.update(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=False))
    variables.update(zip(arguments, given, strict=False))
    variables.update(keywords)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            variables[name] = cell.cell_contents
    for is_global, name, *attributes in _paths(code):
        start = (function.__globals__ if is_global else variables).get(name)
        yield from _at_end(start, attributes, depth)


def _bound(x: Any) -> tuple[Any, tuple, dict[str, Any]]:
    """The function that a call of `x` runs, and arguments that it has already."""
    if isinstance(x, functools.partial):
        function, given, keywords = _bound(x.func)
        return function, (*given, *x.args), keywords | x.keywords
    if isinstance(x, types.MethodType):
        return x.__func__, (x.__self__,), {}
    if isinstance(x, types.FunctionType):
        return x, (), {}
    return inspect.getattr_static(type(x), "__call__", None), (x,), {}


@functools.lru_cache(1024)
def _paths(code: types.CodeType) -> tuple[tuple, ...]:
    """What `code` loads: whether a global, its name, and the attributes loaded from it."""
    paths: list[tuple] = []
    changed: set[str] = set()
    is_open = False
    for step in dis.get_instructions(code):
        # From Python 3.13 on one instruction may load two variables.
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if is_open and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            paths[-1] += names
            continue
        is_open = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL"))
        if is_open:
            paths += [(step.opname == "LOAD_GLOBAL", name) for name in names]
        elif step.opname.startswith("STORE_"):
            changed.update(names)
    return tuple(path for path in dict.fromkeys(paths) if path[0] or path[1] not in changed)


def _at_end(x: Any, attributes: list[str], depth: int) -> Iterator[Tensor]:
    """The tensors that are read where `attributes` of `x`, one of another, lead to."""
    for name in attributes:
        if isinstance(x, Tensor):
            if name not in _DETACHED:
                yield x
            return
        x = _attribute(x, name)
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        tensors = list(x.values() if isinstance(x, dict) else x)
        if all(map(needs_grad, tensors)):  # whichever of them is read
            yield from tensors
    elif depth and isinstance(x, (types.FunctionType, types.MethodType, functools.partial)):
        yield from _read_by(x, depth - 1)


def _attribute(x: Any, name: str) -> Any:
    """An attribute for which no code of the caller's runs, or None."""
    own = getattr(x, "__dict__", {})
    for found in (own, *(own.get(of) for of in _OF_MODULES)):
        if isinstance(found, (dict, types.MappingProxyType)) and name in found:
            return found[name]
    found = inspect.getattr_static(type(x), name, None)
    return types.MethodType(found, x) if isinstance(found, types.FunctionType) else found
