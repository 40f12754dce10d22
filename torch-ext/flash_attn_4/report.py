"""Answers for people: which variant runs here, and what happens to a given call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType, SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import execute
from .flash_attn4_cute.cache_update import CacheUpdate
from .flash_attn4_cute.device import describe as describe_device
from .flash_attn4_cute.problem import AttentionTensors
from .interface import flash_attn_varlen_func, flash_attn_with_kvcache
from .request import is_for_operators, resolved, unpacked
from .states import is_merged_by_kernel


def describe() -> str:
    """Which variant runs on this machine, and why.

    Returns:
        One line for the CPU, or one per CUDA device.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return "\n".join(describe_device(torch.device("cuda", i)) for i in range(count))
    return (
        "variant cpu: exact attention in PyTorch operations, "
        f"because torch {torch.__version__} finds no CUDA device"
    )


def explain(*arguments: Any, **keywords: Any) -> str:
    """What a call with these arguments would run. Nothing is computed, compiled or written.

    Args:
        arguments, keywords: those of flash_attn_func, flash_attn_varlen_func, or, if one of them is
            only known to it, flash_attn_with_kvcache. Or a function of this package that attends
            or merges, and its arguments: explain(flash_attn_combine, out_partial, ...).

    Returns:
        Text for people: the variant and why, each kernel of the call and where its code comes from,
        its tiles and the number of splits.

    Raises:
        TypeError, ValueError, NotImplementedError: exactly what the call would raise. A kernel that
            cannot be compiled here is told, not raised.
    """
    if arguments and isinstance(arguments[0], FunctionType):
        function, arguments = arguments[0], arguments[1:]
        if function.__globals__.get("__package__") != __package__:
            raise TypeError(
                f"explain: {function.__module__}.{function.__qualname__} is no function of "
                f"{__package__}. Pass one of those, or only the arguments of a call."
            )
    else:
        function = _function_of(arguments, keywords)
    try:
        _instead_of_calls(function)(*arguments, **keywords)
    except _Answer as answer:
        return answer.text
    raise TypeError(f"explain: {function.__name__} neither attends nor merges. Call it instead.")


def _function_of(arguments: tuple, keywords: dict[str, Any]) -> FunctionType:
    """Which function these arguments are for."""
    parameters, cached = (
        inspect.signature(f).parameters for f in (flash_attn_varlen_func, flash_attn_with_kvcache)
    )
    given = {name for name, value in keywords.items() if value is not None}
    named = given & (set(cached) - set(parameters))
    appends = len(arguments) >= 3 and not {"k", "v"}.isdisjoint(given)
    found: Any = flash_attn_with_kvcache if named or appends else flash_attn_varlen_func
    return found


class _Answer(Exception):
    """What there is to say of a call, in place of its results."""

    def __init__(self, device: torch.device, text: str):
        self.text = f"{describe_device(device)}\n{text}"


def _instead_of_calls(function: FunctionType) -> Callable[..., Any]:
    """`function` itself, which for this once hands its request over to be explained.

    So no argument is taken otherwise than the function takes it.
    """
    no_repeats = SimpleNamespace(merged_again=lambda *_: (None, None))
    others = {"ask": _asked, "send": _sent, "merged": _merged, "repeat_merge": no_repeats}
    names = {name: x for name, x in others.items() if name in function.__globals__}
    made = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _asked(
    asked: tuple,
    longest: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    others: tuple | None,
    aux: Any = None,
    interleaved: bool | None = None,
    check: Callable[[Tensor, tuple], None] | None = None,
) -> NoReturn:
    """In place of request.ask."""
    _sent(*unpacked(qkv, others, aux, interleaved, check), asked, longest)


def _sent(
    tensors: AttentionTensors, update: CacheUpdate | None, asked: tuple, longest: Any
) -> NoReturn:
    """In place of request.send."""
    with nullcontext() if update is None else torch.no_grad():
        options = resolved(tensors, asked, longest)
        is_for_operators(tensors, options, update)
        text = execute.explained(tensors, options, update)
    raise _Answer(tensors.q.device, text)


def _merged(
    outs: tuple[Tensor, ...],
    lses: tuple[Tensor, ...],
    out: Tensor | None,
    dtype: torch.dtype,
    *_: Any,
) -> NoReturn:
    """In place of states.merged."""
    text = "merge: PyTorch operations in float32"
    if is_merged_by_kernel(outs, lses):
        text = execute.explained_merge(outs, out, dtype)
    raise _Answer(outs[0].device, text)
