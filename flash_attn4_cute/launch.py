"""Launches the planned kernel on the tensors of one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .append_plan import AppendKey, append_key, explain_append
from .arguments import SMALLEST_SCALE, UNBOUNDED, BlockArgs, ForwardArgs, ScoreArgs
from .block_sparse import BlockSparse, tile_lists
from .cache_update import CacheUpdate
from .compiler import loaded
from .kernel_keys import DecodeKey, ForwardKey
from .launcher.kernel import Kernel
from .plan import Plan, make_plan
from .problem import AttentionProblem, AttentionTensors
from .results import clear, has_work
from .rules import PLAIN


class Prepared(NamedTuple):
    """All that a call needs before its first launch, so that nothing is written before a refusal.

    `attention` is its kernel, None where there is nothing to compute; `append` what writes new keys
    and values before, if there are any.
    """

    plan: Plan
    attention: Kernel | None
    append: tuple[AppendKey, Kernel] | None = None


def prepare(
    problem: AttentionProblem, tensors: AttentionTensors, update: CacheUpdate | None = None
) -> Prepared:
    """The plan of a call and its kernels, compiled and loaded; `tensors.out` may still be missing.

    Raises:
        NotImplementedError: the GPU kernels do not have a feature that the problem asks for.
        ImportError: a kernel has to be compiled and nvidia-cutlass-dsl is not installed.
        RuntimeError: a kernel has to be compiled and FLASH_ATTN_4_JIT=0 forbids it.
    """
    plan, device = make_plan(problem), tensors.q.device
    attention = loaded(plan.key, device) if has_work(problem, tensors) else None
    if update is None:
        return Prepared(plan, attention)
    key = append_key(update, tensors)
    return Prepared(plan, attention, (key, loaded(key, device)))


def explain(
    problem: AttentionProblem, tensors: AttentionTensors, update: CacheUpdate | None = None
) -> str:
    """What a call would launch, for people; raises what `prepare` refuses, but compiles nothing."""
    text = make_plan(problem).explain()
    if not has_work(problem, tensors):
        text = f"no queries or no keys: the attention is not launched\n{text}"
    if update is None:
        return text
    return f"{explain_append(append_key(update, tensors))}\n{text}"


def forward(
    problem: AttentionProblem, tensors: AttentionTensors, prepared: Prepared | None = None
) -> tuple | None:
    """Write `tensors.out` and, if present, `tensors.lse`, on the current stream of the device.

    Returns the kernel, the arguments that it was called with and what it returned, if it was.

    Raises:
        What `prepare` raises, unless its answer is given.
    """
    plan, kernel, _ = prepare(problem, tensors) if prepared is None else prepared
    out = tensors.out
    assert out is not None, "the interface allocates the output"
    if kernel is None:
        clear(problem, tensors)
        return None
    if problem.misfits:
        tensors = _copied(problem, tensors)
    if isinstance(plan.key, DecodeKey):
        from .decode_launch import decode_args

        args: Any = decode_args(problem, tensors, plan)
    else:
        args = _prefill_args(problem, tensors, plan)
    launched = kernel, args, kernel(args)
    if tensors.out is not None and tensors.out is not out:
        out.copy_(tensors.out)
    return launched


def _prefill_args(problem: AttentionProblem, tensors: AttentionTensors, plan: Plan) -> ForwardArgs:
    key, out = plan.key, tensors.out
    assert isinstance(key, ForwardKey) and out is not None
    k, v = cache_views(problem, tensors)
    return ForwardArgs(
        canonical(tensors.q),
        k,
        v,
        canonical(out),
        tensors.lse,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        tensors.kv_batch_idx,
        tensors.cache_leftpad,
        tensors.page_table,
        tensors.k_descale,
        tensors.v_descale,
        workspace(problem, out, plan.num_splits) if key.merged_dim else None,
        tile_counter(plan, out.device) if key.counts_tiles else None,
        1.0 if key.score.scaled else max(problem.softmax_scale, SMALLEST_SCALE),
        plan.window_left,
        plan.window_right,
        problem.seqlen_q,
        plan.max_ctas,
        plan.num_splits,
        None if key.score == PLAIN else score_args(problem, tensors),
        None if tensors.blocks is None else _block_args(problem, tensors.blocks, key),
    )


def cache_views(problem: AttentionProblem, tensors: AttentionTensors) -> tuple[Tensor, Tensor]:
    """K and V as the kernels of the mma.sync family read them: two values of e4m3 are one."""
    if problem.fp8_kv:
        k, v = (canonical(t, 16).view(problem.dtype) for t in (tensors.k, tensors.v))
        return k, v
    return canonical(tensors.k), canonical(tensors.v)


def new_workspace(size: int, device: torch.device) -> Tensor:
    """Float32 memory for partial results; it comes with whatever it held.

    From PyTorch's allocator, so that a CUDA graph owns its own.
    """
    return torch.empty(size, dtype=torch.float32, device=device)


def workspace(problem: AttentionProblem, out: Tensor, num_splits: int) -> Tensor:
    """Room for O and LSE of each split."""
    values = out.numel() + out.numel() // problem.head_dim_v
    return new_workspace(num_splits * values, out.device)


def tile_counter(plan: Plan, device: torch.device) -> Tensor:
    """Where the CTAs of one launch count tiles; 0 if they do, see `ForwardArgs`."""
    new = torch.empty if plan.max_ctas == UNBOUNDED else torch.zeros
    return new(1, dtype=torch.int32, device=device)


def score_args(problem: AttentionProblem, tensors: AttentionTensors) -> ScoreArgs:
    """The numbers of the steps of a call's scores."""
    slopes, aux = tensors.alibi_slopes, tensors.aux_tensors
    return ScoreArgs(
        problem.softmax_scale,
        problem.softcap,
        None if slopes is None else slopes.expand(problem.batch, problem.num_heads),
        tensors.sink,
        tensors.dropout_state if problem.dropout_p else None,
        int(problem.dropout_p * 2.0**32),
        1.0 / (1.0 - problem.dropout_p),
        tuple(t.view(torch.uint8) if t.dtype is torch.bool else t for t in aux) if aux else None,
    )


def _block_args(problem: AttentionProblem, blocks: BlockSparse, key: ForwardKey) -> BlockArgs:
    cfg = key.cfg
    lengths = (problem.seqlen_q, problem.seqlen_k)
    rows, keys = blocks.block_size
    kinds = blocks.kinds(-(-problem.seqlen_k // keys))
    counts, lists = tile_lists(kinds, blocks.block_size, lengths, (cfg.block_m, cfg.block_n))
    outer = (problem.batch, problem.num_heads)
    counts, lists, kinds = (t.expand(*outer, *t.shape[2:]) for t in (counts, lists, kinds))
    return BlockArgs(counts, lists, kinds, rows, keys)


def _copied(problem: AttentionProblem, tensors: AttentionTensors) -> AttentionTensors:
    """The tensors of a call, with copies in place of those that TMA cannot reach."""
    copies = {
        name: getattr(tensors, name).clone(memory_format=torch.contiguous_format)
        for name, _ in problem.misfits
        if name != "out" or tensors.out is not None
    }
    return replace(tensors, **copies)


def canonical(t: Tensor, unit: int = 8) -> Tensor:
    """Give dimensions of size 1, whose stride means nothing, one that TMA accepts.

    `unit` is how many elements of t are 16 bytes.
    """
    if all(stride % unit == 0 for stride in t.stride()[:-1]):
        return t
    shape = zip(t.shape, t.stride(), strict=True)
    strides = [unit if size == 1 else stride for size, stride in shape]
    return t.as_strided(t.shape, [*strides[:-1], 1])
