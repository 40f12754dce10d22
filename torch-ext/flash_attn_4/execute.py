"""Validate, allocate, and hand one call to the variant that runs on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu
from .flash_attn4_cute.cache_update import CacheUpdate, check_cache_update
from .flash_attn4_cute.checks import refuse
from .flash_attn4_cute.problem import (
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    Full,
    Layout,
    band_of,
)
from .flash_attn4_cute.values import check_values


def attend(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of one call; lse is None unless asked for.

    With an `update`, first write its keys and values into the cache, then attend to all of it.
    Everything is checked before anything is written.
    """
    problem = AttentionProblem.from_tensors(tensors, options)
    if update is not None:
        check_cache_update(update, tensors)
        _check_no_gradient(problem)
    variant = _variant(problem)
    variant.check(problem, tensors)
    if update is not None:
        along = not isinstance(band_of(problem.mask), Full)
        variant.append(update, tensors, along)
    return _run(problem, tensors, variant.forward)


def differentiate(
    tensors: AttentionTensors,
    options: AttentionOptions,
    results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) of a call from its results (out, lse) and their gradients."""
    problem = AttentionProblem.from_tensors(tensors, options)
    if problem.device.type != "cpu":
        raise refuse(
            NotImplementedError,
            "requires_grad",
            True,
            f"there is no backward pass on {problem.device}",
            "Call under torch.no_grad(), or move the tensors to the CPU",
        )
    tensors.out, tensors.lse = results
    return cpu.backward(problem, tensors, *gradients)


def has_kernels(device: torch.device) -> bool:
    """Whether partial results on `device` are merged by a kernel."""
    return device.type == "cuda"


def merge(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> None:
    """Merge partial results on a CUDA device; see combine_plan."""
    from .flash_attn4_cute import combine_plan

    combine_plan.check_merge("out_partial" if len(outs) == 1 else "out_a", outs[0])
    combine_plan.merge(outs, lses, out, lse)


@dataclass(frozen=True, slots=True)
class _Variant:
    """What carries out a call on one kind of device.

    `check` refuses what `forward` cannot do, before anything is written. `append` carries out an
    update and makes the tensors ask about the result.
    """

    check: Callable[[AttentionProblem, AttentionTensors], object]
    append: Callable[[CacheUpdate, AttentionTensors, bool], None]
    forward: Callable[[AttentionProblem, AttentionTensors], None]


_CPU = _Variant(check_values, cpu.append_kv, cpu.forward)


def _variant(problem: AttentionProblem) -> _Variant:
    if problem.device.type == "cpu":
        return _CPU
    if problem.device.type != "cuda":
        raise refuse(
            NotImplementedError,
            "q.device",
            problem.device,
            "there are kernels for cpu and cuda tensors",
            "Move q, k and v to one of them",
        )
    return _cuda()


def _run(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    forward: Callable[[AttentionProblem, AttentionTensors], None],
) -> tuple[Tensor, Tensor | None]:
    q = tensors.q
    # Packed or partly used queries may leave rows that belong to no sequence and no kernel writes.
    sparse = problem.has_seqused_q or problem.q_layout is Layout.VARLEN
    nothing_to_do = problem.batch == 0 or problem.seqlen_k == 0 or q.numel() == 0
    if tensors.out is None:
        allocate = q.new_zeros if sparse else q.new_empty
        tensors.out = allocate(problem.out_shape(q))
    if tensors.lse is None and problem.return_lse:
        tensors.lse = q.new_empty(problem.lse_shape(q), dtype=torch.float32)
    if tensors.lse is not None and (sparse or nothing_to_do):
        tensors.lse.fill_(-torch.inf)
    if nothing_to_do:
        tensors.out.zero_()
    else:
        forward(problem, tensors)
    return tensors.out, tensors.lse


def _check_no_gradient(problem: AttentionProblem) -> None:
    if problem.requires_grad:
        raise refuse(
            NotImplementedError,
            "requires_grad",
            True,
            "a call that writes into the cache has no gradient",
            "Call under torch.no_grad()",
        )


@functools.cache
def _cuda() -> _Variant:
    """The launchers; importing them needs no cutlass, the first launch does."""
    from .flash_attn4_cute import append_plan, launch

    return _Variant(launch.check, append_plan.append, launch.forward)
