"""Launches the planned kernel on the tensors of one call."""

from torch import Tensor

from . import compiler
from .decode_plan import DecodeKey
from .plan import Plan, make_plan
from .problem import AttentionProblem, AttentionTensors, is_aligned

# A scale of 0 makes every visible key count the same; 0 * -inf would not hide the others.
SMALLEST_SCALE = 1e-30


def check(problem: AttentionProblem, tensors: AttentionTensors) -> Plan:
    """The plan of a call that can be launched; `tensors.out` may still be missing.

    Raises:
        NotImplementedError: the GPU kernels do not have a feature that the problem asks for.
    """
    plan, out = make_plan(problem), tensors.out
    if out is not None and not is_aligned(out):
        raise NotImplementedError(
            f"out with strides {tuple(out.stride())} is not supported: the GPU kernels store 16 "
            f"aligned bytes at a time along a contiguous last dimension; pass a contiguous out"
        )
    return plan


def forward(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Write `tensors.out` and, if present, `tensors.lse`, on the current stream of the device.

    Raises:
        NotImplementedError: the GPU kernels do not have a feature that the problem asks for.
        ImportError: the kernel has to be compiled and nvidia-cutlass-dsl is not installed.
    """
    plan = check(problem, tensors)
    out = tensors.out
    assert out is not None, "the interface allocates the output"
    if out.numel() == 0:
        return
    compiler.load_cutlass()
    if isinstance(plan.key, DecodeKey):
        from .decode_launch import decode

        decode(problem, tensors, plan)
        return
    from .arguments import ForwardArgs

    args = ForwardArgs(
        canonical(tensors.q),
        canonical(tensors.k),
        canonical(tensors.v),
        canonical(out),
        tensors.lse,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        max(problem.softmax_scale, SMALLEST_SCALE),
        plan.window_left,
        plan.window_right,
        problem.seqlen_q,
        plan.max_ctas,
    )
    compiler.compiled(plan.key)(args)


def canonical(t: Tensor) -> Tensor:
    """Give dimensions of size 1, whose stride means nothing, one that TMA accepts."""
    if all(stride % 8 == 0 for stride in t.stride()[:-1]):
        return t
    strides = [8 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, [*strides[:-1], 1])
