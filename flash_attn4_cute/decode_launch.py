"""The arguments of the decode kernel for the tensors of one call."""

from .arguments import SMALLEST_SCALE
from .decode_arguments import DecodeArgs
from .kernel_keys import DecodeKey
from .launch import cache_views, canonical, score_args, workspace
from .plan import Plan
from .problem import AttentionProblem, AttentionTensors
from .rules import PLAIN


def decode_args(problem: AttentionProblem, tensors: AttentionTensors, plan: Plan) -> DecodeArgs:
    """What makes the decode kernel that `plan` names write `tensors.out` and `tensors.lse`."""
    key, out = plan.key, tensors.out
    assert isinstance(key, DecodeKey) and out is not None
    k, v = cache_views(problem, tensors)
    return DecodeArgs(
        canonical(tensors.q),
        k,
        v,
        canonical(out),
        tensors.lse,
        workspace(problem, out, plan.num_splits) if key.is_split else None,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.seqused_q,
        tensors.seqused_k,
        tensors.page_table,
        tensors.kv_batch_idx,
        tensors.cache_leftpad,
        tensors.k_descale,
        tensors.v_descale,
        1.0 if key.score.scaled else max(problem.softmax_scale, SMALLEST_SCALE),
        plan.window_left,
        plan.window_right,
        problem.seqlen_q,
        plan.num_splits,
        None if key.score == PLAIN else score_args(problem, tensors),
    )
