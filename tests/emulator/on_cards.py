"""The public functions, answered by the GPU kernels: CPU tensors go to an emulated card.

So the cases of tests/cases.py and the whole way from an argument to a launch are tested without a
GPU, and a case means here what it means to `pytest -m gpu`.
"""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

import ptx_emulator
from ptx_emulator.cli.ours import kernels_on
from tests import harness
from tests.cases import Case

ARCHS = ("sm_90a", "sm_120a", "sm_121a")


@contextmanager
def card(fa4: ModuleType, arch: str, schedule: int = 0) -> Iterator[Any]:
    """While it lasts, `fa4` computes with the kernels for `arch`. Yields the emulator's session."""

    execute = importlib.import_module(f"{fa4.__name__}.execute")
    before = execute._variant, execute.has_kernels
    session = ptx_emulator.session(arch, schedule=schedule, strict="fences")
    with session as emulator, kernels_on(emulator, f"{fa4.__name__}.flash_attn4_cute"):
        execute._variant = lambda problem: execute._cuda()
        execute.has_kernels = lambda device: True
        try:
            yield emulator
        finally:
            execute._variant, execute.has_kernels = before


def verify(
    fa4: ModuleType, case: Case, arch: str = "sm_120a", schedules: Iterable[int] = (0,)
) -> None:
    """The kernel's answer to `case` is right under each schedule."""
    assert case.missing_on_gpu() is None, "the kernels refuse this case"
    call = harness.build(case, torch.device("cpu"))
    for schedule in schedules:
        with card(fa4, arch, schedule) as emulator:
            answer = harness.run(fa4, call)
        assert emulator.runs or not (call.q.numel() and call.k.numel()), "no kernel was launched"
        harness.judge(call, answer)
