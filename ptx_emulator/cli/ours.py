"""Adapter: this repository's kernels, planned and launched as for a CUDA card, on a session."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..session import Session
from .case import Case, Inputs, cut_into_pages

NUM_SMS = 3  # of the emulated card as the planner sees it: few, so that CTAs take several tiles


@contextmanager
def kernels_on(
    emulator: Session, package: str = "flash_attn4_cute"
) -> Iterator[Callable[..., None]]:
    """`launch.forward(problem, tensors)` of a package for CPU tensors, run by `emulator`.

    So is every other launch of the package, such as `append_plan.append` and `combine_plan.merge`.
    """
    modules: tuple[Any, ...] = tuple(
        importlib.import_module(f"{package}.{name}")
        for name in (
            "compiler",
            "launch",
            "plan",
            "append_plan",
            "combine_plan",
            "device",
            "launcher.driver",
        )
    )
    compiler, launch, plan, append_plan, combine_plan, device, driver = modules
    emulated = _driver(driver, emulator)
    variant = emulator.card.arch.replace("sm_", "sm")
    capability = next(found for found, name in device.VARIANTS.items() if name == variant)
    card = device.Card(emulator.card.arch, capability, min(NUM_SMS, emulator.card.num_sms))
    before = device.supported_card, compiler.compiled, compiler.disk_cache.folder
    cuda_driver = driver.cuda_driver

    def compiled(key: Any) -> Callable[..., Any]:
        function = before[1](key)

        def run(arguments: tuple) -> None:
            emulator.allow(arguments)
            emulator.run(function, arguments)

        return run

    driver.cuda_driver = lambda: emulated
    planners = plan, append_plan, combine_plan
    for planner in planners:
        planner.supported_card = lambda device: card
    compiler.compiled = compiled
    # Compiled in this process: the emulator runs the PTX that compiling leaves behind.
    compiler.disk_cache.folder = lambda: None
    plan.make_plan.cache_clear()
    try:
        yield launch.forward
    finally:
        for planner in planners:
            planner.supported_card = before[0]
        compiler.compiled, compiler.disk_cache.folder = before[1:]
        driver.cuda_driver = cuda_driver
        plan.make_plan.cache_clear()


def _driver(module: Any, emulator: Session) -> Any:
    """A Driver of the package that launches on `emulator`."""

    class Emulated(module.Driver):
        def stream(self, device: int) -> int:
            return 0

        def current_device(self) -> int:
            return 0

    return Emulated(emulator.host.library)


def tensors_of(case: Case, inputs: Inputs) -> Any:
    """The AttentionTensors of a case."""
    from flash_attn4_cute.problem import AttentionTensors

    tensors = AttentionTensors(q=inputs.q, k=inputs.k, v=inputs.v, sink=inputs.sink)
    if case.varlen:
        tensors.cu_seqlens_q, tensors.cu_seqlens_k = inputs.cu_q, inputs.cu_k
    if case.page_size is not None:
        pages = cut_into_pages(case, inputs, filler=torch.nan)
        tensors.k, tensors.v, tensors.page_table, tensors.seqused_k = pages
        tensors.cu_seqlens_k = None
    return tensors


def problem_of(case: Case, tensors: Any) -> Any:
    """The AttentionProblem of a case; results are allocated and filled with NaN."""
    from flash_attn4_cute.problem import AttentionOptions, AttentionProblem

    options = AttentionOptions(
        mask=_mask(case),
        softcap=case.softcap,
        num_splits=case.num_splits,
        pack_gqa=case.pack_gqa,
        max_seqlen_q=case.seqlen_q if case.varlen else None,
        max_seqlen_k=case.seqlen_k if case.varlen else None,
        return_lse=True,
    )
    problem = AttentionProblem.from_tensors(tensors, options)
    tensors.out = tensors.q.new_full(problem.out_shape(tensors.q), torch.nan)
    tensors.lse = torch.full(problem.lse_shape(tensors.q), torch.nan)
    return problem


def forward(emulator: Session, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of the forward kernel that the plan picks for the session's card.

    Raises:
        NotImplementedError: the card or a feature that the kernels do not have.
    """
    tensors = tensors_of(case, inputs)
    problem = problem_of(case, tensors)
    with kernels_on(emulator) as launch:
        launch(problem, tensors)
    return tensors.out, tensors.lse


def forward_in_turn(emulator: Session, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same by one CTA, also where the plan lets the card hand out tiles one by one.

    By NUM_SMS where a counter gives more tiles than that.
    """
    plan: Any = importlib.import_module("flash_attn4_cute.plan")
    before, plan.UNBOUNDED = plan.UNBOUNDED, 1
    try:
        return forward(emulator, case, inputs)
    finally:
        plan.UNBOUNDED = before


def _mask(case: Case) -> Any:
    from flash_attn4_cute.mask_rule import FULL, Band

    unbounded = case.left is None and case.right is None
    return FULL if unbounded else Band(case.left, case.right)
