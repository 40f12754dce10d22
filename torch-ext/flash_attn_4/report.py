"""Answers for people: which variant runs here, and what happens to a given call."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .flash_attn4_cute.device import describe as describe_device
from .flash_attn4_cute.overlap import check_apart
from .flash_attn4_cute.problem import (
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    make_mask_rule,
)
from .gradients import check_gradients, needs_grad
from .interface import flash_attn_varlen_func
from .other_arguments import check_others
from .request import key_lengths, one_of

_SIGNATURE = inspect.signature(flash_attn_varlen_func)
_SAME_TENSORS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "k_descale",
    "v_descale",
    "alibi_slopes",
    "out",
)
_SAME_OPTIONS = (
    "softmax_scale",
    "softcap",
    "score_mod",
    "dropout_p",
    "deterministic",
    "num_splits",
    "pack_gqa",
    "max_seqlen_q",
    "max_seqlen_k",
    "return_lse",
)


def describe() -> str:
    """Which variant runs on this machine, and why.

    Returns:
        One line for the CPU, or one per CUDA device.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return "\n".join(describe_device(torch.device("cuda", i)) for i in range(count))
    return (
        "variant cpu: exact attention in PyTorch operations, "
        f"because torch {torch.__version__} finds no CUDA device"
    )


def explain(q: Tensor, k: Tensor, v: Tensor, *positional: Any, **keywords: Any) -> str:
    """What a call of flash_attn_varlen_func, or flash_attn_func, with these arguments would run.

    Args:
        q, k, v, positional, keywords: as for flash_attn_varlen_func; those of flash_attn_func are a
            subset. Nothing is computed.

    Returns:
        Text for people: the variant and why, the kernel, its tiles and the number of splits.

    Raises:
        TypeError, ValueError, NotImplementedError: exactly what the call would raise.
    """
    bound = _SIGNATURE.bind(q, k, v, *positional, **keywords)
    bound.apply_defaults()
    given = bound.arguments
    check_others(flash_attn_varlen_func, given["unsupported"])
    given["return_lse"] |= given["return_softmax_lse"]
    aux = given["aux_tensors"]
    sink = one_of("s_aux", given["s_aux"], "learnable_sink", given["learnable_sink"])
    table = one_of("block_table", given["block_table"], "page_table", given["page_table"])
    given["cu_seqlens_k"], given["seqused_k"] = key_lengths(
        table, given["cu_seqlens_k"], given["seqused_k"]
    )
    tensors = AttentionTensors(
        q=q,
        k=k,
        v=v,
        page_table=table,
        sink=sink,
        aux_tensors=None if aux is None else tuple(aux),
        **{name: given[name] for name in _SAME_TENSORS},
    )
    options = AttentionOptions(
        mask=make_mask_rule(given["causal"], given["window_size"], given["mask_mod"]),
        requires_grad=needs_grad(q, k, v, sink),
        **{name: given[name] for name in _SAME_OPTIONS},
    )
    check_gradients(tensors, options)
    problem = AttentionProblem.from_tensors(tensors, options)
    check_apart(tensors)
    if problem.device.type != "cuda":
        return f"{describe_device(problem.device)}\n{cpu.explain(problem)}"
    from .flash_attn4_cute.plan import make_plan

    return f"{describe_device(problem.device)}\n{make_plan(problem).explain()}"
