"""Upstream's tcgen05 forward kernels, known to be right on real chips, against float64."""

import importlib.util

import pytest
import torch

import ptx_emulator

from . import oracle, upstream
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


def normal(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(torch.bfloat16)


def forward(q, k, v, **options):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    with (
        ptx_emulator.session("sm_100a") as emulator,
        upstream.upstream_on(emulator) as module,
    ):
        return upstream.forward(module, q, k, v, **options)


def test_split_kv():
    q, k, v = normal(1, 64, 2, 128), normal(1, 600, 1, 128, seed=1), normal(1, 600, 1, 128, seed=2)
    out, lse = forward(q, k, v, causal=True, num_splits=3)
    oracle.check(out, lse, q, k, v, True)


def test_varlen():
    starts_q, starts_k = [0, 70, 270], [0, 130, 330]
    q, k, v = normal(270, 2, 64), normal(330, 1, 64, seed=1), normal(330, 1, 64, seed=2)
    out, lse = forward(
        q,
        k,
        v,
        cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(starts_k, dtype=torch.int32),
        max_seqlen_q=200,
        max_seqlen_k=200,
    )
    for i in range(2):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        part = (x[None, keys] for x in (k, v))
        oracle.check(out[None, rows], lse[None, :, rows], q[None, rows], *part, False)


@pytest.mark.parametrize("page_size", [128, 16])  # by TMA, by cp.async
def test_paged(page_size):
    pages = -(-300 // page_size)
    shape = (pages + 2, page_size, 1, 128)
    q, k, v = normal(1, 100, 2, 128), normal(*shape, seed=1), normal(*shape, seed=2)
    table = torch.arange(pages + 1, 1, -1, dtype=torch.int32)[None]
    used = torch.tensor([300], dtype=torch.int32)
    out, lse = forward(q, k, v, causal=True, page_table=table, seqused_k=used)
    k, v = (x[table[0].long()].reshape(1, -1, 1, 128)[:, :300] for x in (k, v))
    oracle.check(out, lse, q, k, v, True)


def test_wide_qk():
    q, k, v = normal(1, 200, 1, 192), normal(1, 300, 1, 192, seed=1), normal(1, 300, 1, 128, seed=2)
    out, lse = forward(q, k, v)
    oracle.check(out, lse, q, k, v, False)
