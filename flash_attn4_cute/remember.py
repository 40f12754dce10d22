"""What a process remembers, and of how many: kernels by their keys, plans by their problems.

A user's mask_mod or score_mod is part of both, so it is kept alive by them, and with it whatever it
refers to: tensors among it. Therefore few with such a function are remembered, those used last.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .disk_cache import holds_function
from .launcher.kernel import Kernel

Answer = TypeVar("Answer")

MAX_WITH_FUNCTIONS = 64
_MAX_PLANS = 4096
_NO_KEY = object()


class OncePerKey:
    """Makes a function of a key remember what it returned.

    What different keys ask for is made at the same time, what one key asks for once: other threads
    wait for it. Nothing is remembered of a failure.
    """

    def __init__(self, make: Callable[[Any], Kernel]):
        functools.update_wrapper(self, make)
        self.make = make
        self.num_made = 0
        # A plan that is asked for again brings the very key: to hash and compare one takes longer.
        self._latest: tuple[Any, Any] = _NO_KEY, None
        self._kept: dict[Any, Kernel] = {}
        self._with_functions: OrderedDict[Any, Kernel] = OrderedDict()
        self._lock = threading.Lock()  # of all that is not `_kept`, for moments
        self._turns: dict[Any, threading.Lock] = {}  # of keys whose kernel is being made

    def __call__(self, key: Any) -> Kernel:
        latest = self._latest
        if latest[0] is key:
            return latest[1]
        found = self._kept.get(key) or self._made(key)
        self._latest = key, found
        return found

    def known(self, key: Any) -> Kernel | None:
        """The kernel of `key` if there is one already."""
        return self._kept.get(key) or self._with_functions.get(key)

    def cache_clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._latest = _NO_KEY, None
            self._kept.clear()
            self._with_functions.clear()

    def _made(self, key: Any) -> Kernel:
        with self._lock:
            found = self._with_functions.get(key)
            if found is not None:
                self._with_functions.move_to_end(key)
                return found
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            try:
                found = self.known(key)
                if found is None:
                    found = self.make(key)
                    self._keep(key, found)
            finally:  # also of a turn that began when another thread had just made it
                with self._lock:
                    self._turns.pop(key, None)
        return found

    def _keep(self, key: Any, kernel: Kernel) -> None:
        with self._lock:
            self.num_made += 1
            if not holds_function(key):
                self._kept[key] = kernel
                return
            self._with_functions[key] = kernel
            if len(self._with_functions) > MAX_WITH_FUNCTIONS:
                self._with_functions.popitem(last=False)


class PerProblem(Generic[Answer]):
    """Makes a planner remember its answers."""

    def __init__(self, plan: Callable[[Any], Answer]):
        functools.update_wrapper(self, plan)
        self._kept = functools.lru_cache(_MAX_PLANS)(plan)
        self._with_functions = functools.lru_cache(MAX_WITH_FUNCTIONS)(plan)

    def __call__(self, problem: Any) -> Answer:
        if problem.holds_function:
            return self._with_functions(problem)
        return self._kept(problem)

    def cache_clear(self) -> None:
        """Forget all of them."""
        self._kept.cache_clear()
        self._with_functions.cache_clear()
