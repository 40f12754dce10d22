"""Who must see a call besides the caller, and what tensors are more than their memory.

Dispatch modes (FlopCounterMode, make_fx), transforms (torch.func) and torch.jit.trace work on
operators. A subclass of Tensor, a negative view and a tensor of zeros without memory mean what
operators make of them, and not what lies at their address. A TorchFunctionMode is told of PyTorch's
functions, of which these are none; one is on wherever a default device is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from .checks import refuse

_MEMORY_TYPES = frozenset({Tensor, torch.nn.Parameter})


def _probe(name: str, default: Any) -> Any:
    """A function of torch._C, no public interface; where it is missing, one that finds nothing."""
    found: Any = torch._C
    for part in name.split("."):
        found = getattr(found, part, None)
    return (lambda: default) if found is None else found


_num_modes = _probe("_len_torch_dispatch_stack", 0)
_transform = _probe("_functorch.peek_interpreter_stack", None)
_transforms = _probe("_functorch.get_interpreter_stack", None)
_trace = _probe("_get_tracing_state", None)


def is_watched() -> bool:
    """Whether a mode, a transform or a tracer is active."""
    return _num_modes() > 0 or _transform() is not None or _trace() is not None


def check_transforms() -> None:
    """Refuse to be recorded by torch.func.grad and its like, which custom operators do not know."""
    for transform in _transforms() or ():
        if transform.key().name == "Grad":
            raise refuse(
                NotImplementedError,
                "torch.func",
                "grad, vjp or another of its derivatives",
                "the call has a gradient by torch.autograd only",
                "Use torch.autograd.grad or backward(), with torch.func.functional_call too",
            )


def check_strided(names: Iterable[str], tensors: Iterable[Any]) -> None:
    """Refuse tensors whose elements do not lie at strides: sparse, nested and opaque ones."""
    for name, t in zip(names, tensors, strict=False):
        if isinstance(t, Tensor) and (t.layout is not torch.strided or t.is_nested):
            raise refuse(
                TypeError,
                name,
                f"a {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')} tensor",
                "must be an ordinary, strided tensor",
                f"Pass {name}.values() and its offsets as cu_seqlens"
                if t.is_nested
                else f"Convert it with {name}.to_dense()",
            )


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all that are given are what lies at their addresses."""
    for t in tensors:
        if t is not None and (type(t) not in _MEMORY_TYPES or t.is_neg() or t._is_zerotensor()):
            return False
    return True


def is_only_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call on these tensors is a matter of addresses now."""
    return dual_levels._current_level < 0 and not is_watched() and are_plain(tensors)


# Its _current_level is negative where no tensor can have a tangent of forward-mode AD.
dual_levels: Any = (
    forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
)


def check_tangents(names: Iterable[str], tensors: Iterable[Any]) -> None:
    """Refuse dual numbers: the call has no forward-mode derivative, and would drop the tangent."""
    if dual_levels._current_level < 0:
        return
    if is_dynamo_compiling():  # a frame of its own, after a graph broke
        check_level()
    for name, t in zip(names, tensors, strict=False):
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise refuse(
                NotImplementedError,
                name,
                "a dual tensor",
                "there is no forward-mode derivative",
                "Use reverse mode, or pass forward_ad.unpack_dual(...).primal",
            )


def check_level() -> None:
    """`check_tangents` of a call that is traced: what is traced does not show its tangents."""
    if dual_levels is forward_ad and dual_levels._current_level >= 0:
        raise refuse(
            NotImplementedError,
            "torch.compile",
            "in forward-mode AD",
            "there is no forward-mode derivative",
            "Use reverse mode, or leave forward_ad.dual_level() before",
        )
