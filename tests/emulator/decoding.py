"""What the emulator's tests of decoding, pages and split keys share."""

import torch

from ptx_emulator.cli.case import Case
from ptx_emulator.cli.ours import kernels_on


def poisoned(size, device):
    """A workspace in which nothing may be read before it is written."""
    return torch.full((size,), torch.nan, device=device)


def case(**changes) -> Case:
    """A small question; d_v is d unless given."""
    options = {
        "dtype": torch.bfloat16,
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "seqlen_q": 1,
        "seqlen_k": 300,
        "head_dim": 64,
        **changes,
    }
    return Case(**{"head_dim_v": options["head_dim"], **options})


def attend(emulator, tensors, options, kernel="DecodeKey"):
    """(out, lse) of the decode or forward kernel, both and the workspace filled with NaN before."""
    from flash_attn4_cute import launch
    from flash_attn4_cute.plan import make_plan
    from flash_attn4_cute.problem import AttentionProblem

    problem = AttentionProblem.from_tensors(tensors, options)
    tensors.out = tensors.q.new_full(problem.out_shape(tensors.q), torch.nan)
    tensors.lse = torch.full(problem.lse_shape(tensors.q), torch.nan)
    before, launch.new_workspace = launch.new_workspace, poisoned
    try:
        with kernels_on(emulator) as forward:
            plan = make_plan(problem)
            assert type(plan.key).__name__ == kernel and plan.num_splits == options.num_splits
            forward(problem, tensors)
    finally:
        launch.new_workspace = before
    return tensors.out, tensors.lse
