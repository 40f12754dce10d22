"""The vocabulary of every check of user input: one way to say what is wrong and how to get out.

Each message names the argument, its value, the rule, and what to do instead:

    head_dim=0: must be at least 1. Pass q with a last dimension of 1 or more.

All checks here look at shapes, dtypes and devices only, so they are cheap and never wait for a GPU.
"""

from __future__ import annotations

import math
import numbers
import operator
from inspect import CO_VARARGS
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn

_Error = TypeVar("_Error", ValueError, TypeError, NotImplementedError)


def refuse(kind: type[_Error], argument: str, value: Any, rule: str, way_out: str) -> _Error:
    """The exception to raise for `argument` having `value`, which breaks `rule`."""
    return kind(f"{argument}={value}: {rule}. {way_out}.")


def as_int(name: str, value: Any) -> int:
    """`value` as an int: whole numbers of any type and 0-d CPU tensors of such are accepted.

    So are True and 2.0: a call is known by its arguments, and these equal 1 and 2.
    """
    if type(value) is int:
        return value
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise refuse(
            TypeError,
            name,
            f"tensor on {value.device}",
            "must be a plain integer, since reading it from the device would stall every call",
            f"Pass an int, for example int({name}) computed once per step",
        )
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    whole = _whole(plain(value))
    if whole is None:
        raise refuse(
            TypeError,
            name,
            f"{value!r} ({type(value).__name__})",
            "must be an integer",
            "Pass an int, a NumPy integer or a 0-d integer CPU tensor",
        )
    return whole


def _whole(value: Any) -> int | None:
    """The int that `value` equals, or None."""
    try:
        return int(operator.index(value))
    except TypeError:
        pass
    try:
        real = getattr(value, "real", None) if isinstance(value, numbers.Number) else None
        whole = None if real is None else int(real)
    except (OverflowError, ValueError):  # infinity and NaN
        return None
    return whole if whole == value else None


def as_bool(name: str, value: Any, rule: str = "True or False", way_out: str = "a bool") -> bool:
    """`value` as a bool: what equals True or False is accepted."""
    if value is True or value is False:
        return value
    found = plain(value)
    of_many = isinstance(found, Tensor) or getattr(found, "ndim", 0) > 0
    if not of_many and found in (0, 1):
        return bool(found)
    raise refuse(TypeError, name, repr(value), f"must be {rule}", f"Pass {way_out}")


def plain(value: Any) -> Any:
    """A NumPy number or a 0-d CPU tensor as a number of Python's; what is neither as it is."""
    if type(value) is Tensor:
        if value.dim() or not value.is_cpu or value.requires_grad:
            return value
    elif getattr(value, "ndim", 1) != 0 or isinstance(value, Tensor):
        return value
    found = value.item()
    return found if type(found) in (bool, int, float) else value


def as_maximum(name: str, value: Any) -> int | None:
    """An upper bound as an int; None, "derive it from the shapes", for a 0-d tensor on a device.

    Reading it from there would stall every call, and fail while a CUDA graph is captured.
    """
    return None if is_bound_on_device(value) else as_int(name, value)


def is_bound_on_device(value: Any) -> bool:
    """Whether `value` is a 0-d integer tensor on a device."""
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return False
    return value.dim() == 0 and value.dtype in (torch.int32, torch.int64)


def as_float(name: str, value: Any) -> float:
    """`value` as a finite float: numbers and 0-d CPU tensors are accepted."""
    if type(value) is not float:
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise refuse(
                ValueError,
                name,
                "a tensor that requires grad",
                "is a number and has no gradient",
                f"Pass {name}.item(), or scale q by the tensor",
            )
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise refuse(
                TypeError,
                name,
                f"tensor on {value.device}",
                "must be a plain number, since reading it from the device would stall every call",
                "Pass a float",
            )
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise refuse(
                TypeError, name, f"{value!r}", "must be a number", "Pass a float"
            ) from None
    if not math.isfinite(value):
        raise refuse(ValueError, name, value, "must be finite", "Pass a finite float")
    return value


def check_is_tensor(name: str, value: Any) -> None:
    """`value` is a torch.Tensor."""
    if not isinstance(value, Tensor):
        raise refuse(
            TypeError, name, type(value).__name__, "must be a torch.Tensor", "Pass a tensor"
        )


def check_function(name: str, function: Any, arguments: str) -> None:
    """`function` is callable with these positional arguments, as far as its code shows."""
    if not callable(function):
        raise refuse(TypeError, name, repr(function), "must be callable", "Pass a function or None")
    if is_dynamo_compiling() or type(function) is not FunctionType:
        return
    code, number = function.__code__, arguments.count(",") + 1
    fewest = code.co_argcount - len(function.__defaults__ or ())
    by_name = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    for needed in by_name:
        if needed not in (function.__kwdefaults__ or {}):
            raise refuse(
                TypeError,
                name,
                f"{function.__qualname__}, a function that needs {needed} by name",
                f"must take {arguments}",
                f"Give {needed} a default, or bind it by functools.partial",
            )
    if fewest > number or (code.co_argcount < number and not code.co_flags & CO_VARARGS):
        theirs = arguments.split(", seqlen_info")[0]
        raise refuse(
            TypeError,
            name,
            f"{function.__qualname__}, a function of {code.co_argcount} arguments",
            f"must take {arguments}",
            f"Wrap one of FlexAttention's: lambda {theirs}, *_: f({theirs})",
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """`tensor` has exactly the shape `expected`; `meaning` says what its dimensions are."""
    if tensor.shape != expected:
        raise refuse(
            ValueError,
            f"{name}.shape",
            tuple(tensor.shape),
            f"must be {meaning} = {tuple(expected)}",
            f"Reshape {name} or correct the tensor that it must agree with",
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """`tensor` lives where q lives."""
    if tensor.device != device:
        raise refuse(
            ValueError,
            f"{name}.device",
            tensor.device,
            f"must be q's device, {device}",
            f"Move it with {name}.to({str(device)!r})",
        )


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """`tensor` has one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        raise refuse(
            TypeError,
            f"{name}.dtype",
            tensor.dtype,
            f"must be {names}",
            f"Convert it with {name}.to({allowed[0]})",
        )


def check_index_tensor(
    name: str, tensor: Tensor, device: torch.device, shape: tuple[int, ...], meaning: str
) -> None:
    """`tensor` is int32, of the given shape, on q's device, contiguous in its last dimension."""
    check_is_tensor(name, tensor)
    if tensor.dtype != torch.int32:
        check_dtype(name, tensor, (torch.int32,))
    check_device(name, tensor, device)
    check_shape(name, tensor, shape, meaning)
    # A dimension of size 1 has no stride: (b, 1) with strides (1, b) is contiguous.
    if tensor.numel() > 1 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise refuse(
            ValueError,
            f"{name}.stride",
            tensor.stride(),
            "must be 1 in the last dimension",
            f"Pass {name}.contiguous()",
        )
