"""Whether the tensors of a call are like those of an earlier one, by one look at all of them.

What torch.compile guards its graphs with: PyTorch's own comparison of type, dispatch keys, dtype,
device, shape, strides and requires_grad. It takes a third of the time in which Python reads what
`repeat.key_of` needs. Dispatch keys also tell of active modes, see `watchers`, and of views whose
values are not those in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import is_grad_enabled

from .watchers import dual_levels


def _guards() -> Any:
    """PyTorch's comparison if it works as we know it, for it is no public interface; else None."""
    try:
        found: Any = torch._C._dynamo.guards.TensorGuards
        t = torch.zeros(2, device="cpu")
        check = found(t, dynamic_dims_sizes=[], dynamic_dims_strides=[]).check
        works = check(t) and not check(t[:1]) and not check(None)
    except Exception:
        return None
    return found if works else None


_Guards = _guards()


class Likeness:
    """What some tensors are like; None among them stays None."""

    def __init__(self, tensors: tuple):
        self.looks: list[tuple[Callable[..., bool], Callable[[tuple], tuple]]] = []
        places = [i for i, t in enumerate(tensors) if t is not None]
        # Whether the call is recorded is up to what holds when it is made.
        self.may_be_recorded = any(tensors[i].requires_grad for i in places)
        while places:  # a look takes each tensor once
            first = sorted({id(tensors[i]): i for i in reversed(places)}.values())
            pick = _picker(first)
            guards = _Guards(*pick(tensors), dynamic_dims_sizes=[], dynamic_dims_strides=[])
            self.looks.append((guards.check, pick))
            places = [i for i in places if i not in first]

    @staticmethod
    def of(tensors: tuple) -> Likeness | None:
        """None if this PyTorch cannot tell."""
        return None if _Guards is None else Likeness(tensors)

    def holds(self, tensors: tuple) -> bool:
        """Whether `tensors`, None at the same places, are like that, and autograd need not know.

        Nor need anyone else, see `watchers`.
        """
        if self.may_be_recorded and is_grad_enabled():
            return False
        if dual_levels._current_level >= 0:
            return False
        # Not all() of a generator, which costs as much as a look.
        for same, pick in self.looks:  # noqa: SIM110
            if not same(*pick(tensors)):
                return False
        return True


def _picker(places: Sequence[int]) -> Callable[[tuple], Any]:
    """What takes the tensors at `places`, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
