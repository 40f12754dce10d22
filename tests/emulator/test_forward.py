"""Whole forward kernels of this repository against float64."""

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli.ours import kernels_on

from . import oracle

OURS = [
    ("sm_90a", torch.bfloat16, (300, 300, 2, 1, 128), True, 0),
    ("sm_120a", torch.bfloat16, (129, 257, 1, 1, 64), False, 5),
    ("sm_121a", torch.float16, (65, 200, 1, 1, 128), True, 7),
]


def inputs(dtype, shape):
    sq, sk, heads, heads_kv, d = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    return normal(1, sq, heads, d), normal(1, sk, heads_kv, d), normal(1, sk, heads_kv, d)


@pytest.mark.parametrize(("arch", "dtype", "shape", "causal", "schedule"), OURS)
def test_ours(arch, dtype, shape, causal, schedule):
    from flash_attn4_cute.problem import (
        FULL,
        AttentionOptions,
        AttentionProblem,
        AttentionTensors,
        Band,
    )

    q, k, v = inputs(dtype, shape)
    tensors = AttentionTensors(q=q, k=k, v=v)
    mask = Band(None, 0) if causal else FULL
    problem = AttentionProblem.from_tensors(tensors, AttentionOptions(mask=mask, return_lse=True))
    tensors.out = torch.full_like(q, torch.nan)
    tensors.lse = torch.full((1, q.shape[2], q.shape[1]), torch.nan)
    session = ptx_emulator.session(arch, schedule=schedule, strict=True)
    with session as emulator, kernels_on(emulator) as forward:
        forward(problem, tensors)
    oracle.check(tensors.out, tensors.lse, q, k, v, causal)
