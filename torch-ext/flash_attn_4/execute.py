"""Validate, allocate, and hand one call to the variant that runs on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
        _check_appendable(problem)
    if problem.device.type == "cpu":
        check_values(problem, tensors)
    if update is not None:
        along = not isinstance(band_of(problem.mask), Full)
        cpu.append_kv(update, tensors, rotate_along=along)
    return _run(problem, tensors)


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


def _run(problem: AttentionProblem, tensors: AttentionTensors) -> tuple[Tensor, Tensor | None]:
    q = tensors.q
    device_type = problem.device.type
    if device_type not in ("cpu", "cuda"):
        raise refuse(
            NotImplementedError,
            "q.device",
            problem.device,
            "there are kernels for cpu and cuda tensors",
            "Move q, k and v to one of them",
        )
    if device_type == "cuda" and problem.has_cache_leftpad:
        raise refuse(
            NotImplementedError,
            "cache_leftpad",
            f"tensor on {problem.device}",
            "left padding of the cache runs on the CPU only",
            "Shift the cache, or use a page_table",
        )
    forward = cpu.forward if device_type == "cpu" else _cuda_forward()
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


def _check_appendable(problem: AttentionProblem) -> None:
    if problem.device.type != "cpu":
        raise refuse(
            NotImplementedError,
            "k, v",
            f"new tokens on {problem.device}",
            "appending to the cache and rotary embedding run on the CPU only",
            "Write k and v into the cache before the call and count them in cache_seqlens",
        )
    if problem.requires_grad:
        raise refuse(
            NotImplementedError,
            "requires_grad",
            True,
            "a call that writes into the cache has no gradient",
            "Call under torch.no_grad()",
        )


@functools.cache
def _cuda_forward() -> Callable[[AttentionProblem, AttentionTensors], None]:
    """The launcher; importing it needs no cutlass, the first launch does."""
    from .flash_attn4_cute import launch

    return launch.forward
