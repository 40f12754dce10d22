"""Adapter: this repository's kernels, planned and launched as for a CUDA card, on a session."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..session import Session


@contextmanager
def kernels_on(emulator: Session) -> Iterator[Callable[..., None]]:
    """`flash_attn4_cute.launch.forward(problem, tensors)` for CPU tensors, run by `emulator`."""
    from flash_attn4_cute import launch, plan

    variant = emulator.card.arch.replace("sm_", "sm")
    before = plan.variant_for, launch.compiled_forward

    def compiled_forward(key: Any) -> Callable[..., Any]:
        function = before[1](key)
        return lambda *args: emulator.call(function, *args)

    plan.variant_for = lambda device: variant
    launch.compiled_forward = compiled_forward  # type: ignore[assignment]
    plan.make_plan.cache_clear()
    try:
        yield launch.forward
    finally:
        plan.variant_for, launch.compiled_forward = before
        plan.make_plan.cache_clear()
