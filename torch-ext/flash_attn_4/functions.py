"""The caller's functions, score_mod and mask_mod, as numbers in the arguments of operators.

An operator's schema has no type for functions. Numbers start at random, so that a graph that was
kept on disk or exported by another process never names a function of this one: its numbers are
unknown here, and PyTorch's caches, which look graphs up by their constants, do not find it.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch.compiler import is_dynamo_compiling
from torch.utils.weak import WeakIdKeyDictionary

from .flash_attn4_cute.checks import refuse

_next = itertools.count(secrets.randbits(62) + 1)
_functions: WeakValueDictionary[int, Callable] = WeakValueDictionary()
_numbers: Any = WeakIdKeyDictionary()  # by identity: a caller's class may say what is equal
_settled = 0  # the number of the function that Dynamo met last


def number_of(function: Callable) -> int:
    """The number that stands for `function` while it lives."""
    try:
        number = _numbers.get(function)
        if number is None:
            number = _numbers[function] = next(_next)
            _functions[number] = function
    except TypeError:
        raise refuse(
            TypeError,
            "score_mod or mask_mod",
            repr(function),
            "must be an object to which there can be weak references",
            "Pass a function, or add __weakref__ to the __slots__ of its class",
        ) from None
    return number


def handle(function: Callable | None) -> int:
    """`number_of`; 0 for None. Where torch.compile traces the call, see `traced_functions`."""
    if function is None:
        return 0
    if not is_dynamo_compiling():
        return number_of(function)
    from torch._dynamo.comptime import comptime

    comptime(_settle)
    return _last_settled()


def _settle(context: Any) -> None:
    global _settled
    from .traced_functions import settle  # torch._dynamo, seconds to import, is there by now

    _settled = settle(context, "function")


def _last_settled() -> int:
    return _settled


# What torch.compiler.assume_constant_result does, which imports torch._dynamo.
_last_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def function_of(number: int) -> Callable | None:
    """The inverse of `handle`."""
    if number == 0:
        return None
    function = _functions.get(number)
    if function is None:
        raise refuse(
            ValueError,
            "score_mod or mask_mod",
            f"function {number} of a traced graph",
            "is no longer alive, or was one of another process",
            "Keep the function for as long as the graph, and trace the graph in this process",
        )
    return function
