"""Upstream's wgmma forward kernel, known to be right on real chips, against float64."""

import importlib.util

import pytest
import torch

import ptx_emulator

from . import oracle, upstream

# (batch, sq, sk, heads, heads_kv, d), causal, schedule
CASES = [
    ((1, 128, 128, 1, 1, 128), False, 0),
    ((1, 200, 300, 2, 1, 128), True, 0),
    ((2, 100, 200, 1, 1, 64), True, 3),
]


def run(arch, dtype, shape, causal, schedule):
    """Upstream's forward on `arch` in the emulator, checked."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    batch, sq, sk, heads, heads_kv, d = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(batch, *size, generator=generator).to(dtype)

    q, k, v = normal(sq, heads, d), normal(sk, heads_kv, d), normal(sk, heads_kv, d)
    with (
        ptx_emulator.session(arch, schedule=schedule) as emulator,
        upstream.upstream_on(emulator) as module,
    ):
        out, lse = upstream.forward(module, q, k, v, causal=causal)
    oracle.check(out, lse, q, k, v, causal)


@pytest.mark.parametrize(("shape", "causal", "schedule"), CASES)
def test_forward(shape, causal, schedule):
    run("sm_90a", torch.bfloat16, shape, causal, schedule)
