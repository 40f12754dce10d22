"""The public functions, answered by the GPU kernels: CPU tensors go to an emulated card.

So the cases of tests/cases.py and the whole way from an argument to a launch are tested without a
GPU, and a case means here what it means to `pytest -m gpu`.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import ptx_emulator
from ptx_emulator.cli.ours import NUM_SMS
from tests import harness
from tests.cases import Case

ARCHS = ("sm_90a", "sm_120a", "sm_121a")


@contextmanager
def card(fa4: ModuleType, arch: str, schedule: int = 0) -> Iterator[Any]:
    """While it lasts, `fa4` computes with the kernels for `arch`. Yields the emulator's session."""

    def module(name: str) -> ModuleType:
        return sys.modules[f"{fa4.__name__}.{name}"]

    __import__(f"{fa4.__name__}.flash_attn4_cute.launch")
    compiler, launch = module("flash_attn4_cute.compiler"), module("flash_attn4_cute.launch")
    plan, execute = module("flash_attn4_cute.plan"), module("execute")
    device = module("flash_attn4_cute.device")
    capability = next(c for c, name in device.VARIANTS.items() if name == arch.replace("_", ""))
    emulated = device.Card(arch, capability, NUM_SMS)
    before = plan.supported_card, compiler.compiled, execute.cpu
    with ptx_emulator.session(arch, schedule=schedule, strict=True) as emulator:

        def compiled(key: Any) -> Any:
            function = before[1](key)
            return lambda *args: emulator.call(function, *args)

        plan.supported_card = lambda device: emulated
        compiler.compiled = compiled
        execute.cpu = SimpleNamespace(forward=launch.forward)
        plan.make_plan.cache_clear()
        try:
            yield emulator
        finally:
            plan.supported_card, compiler.compiled, execute.cpu = before
            plan.make_plan.cache_clear()


def verify(
    fa4: ModuleType, case: Case, arch: str = "sm_120a", schedules: Iterable[int] = (0,)
) -> None:
    """The kernel's answer to `case` is right under each schedule."""
    assert case.missing_on_gpu() is None, "the kernels refuse this case"
    call = harness.build(case, torch.device("cpu"))
    for schedule in schedules:
        with card(fa4, arch, schedule):
            answer = harness.run(fa4, call)
        harness.judge(call, answer)
