"""Upstream's tcgen05 forward kernels, known to be right on real chips, against float64."""

import pytest
import torch

from .test_upstream_sm90 import run

# arch, (batch, sq, sk, heads, heads_kv, d), causal, schedule
CASES = [
    ("sm_100a", (1, 256, 256, 1, 1, 128), False, 0),
    ("sm_100a", (1, 512, 512, 1, 1, 128), False, 0),  # a pair of CTAs
    ("sm_100a", (1, 300, 300, 1, 1, 128), False, 5),  # a pair of CTAs
    ("sm_100a", (1, 300, 300, 2, 1, 128), True, 0),
    ("sm_100a", (1, 200, 300, 2, 1, 64), True, 3),
    ("sm_103a", (1, 256, 384, 1, 1, 128), True, 0),
    ("sm_103a", (1, 300, 300, 1, 1, 64), False, 0),
]


@pytest.mark.parametrize(("arch", "shape", "causal", "schedule"), CASES)
def test_forward(arch, shape, causal, schedule):
    run(arch, torch.bfloat16, shape, causal, schedule)


def test_forward_f16():
    run("sm_100a", torch.float16, (1, 130, 257, 1, 1, 128), False, 0)
