"""Decoding from caches of e4m3: the cpu variant says what they mean."""

import pytest
import torch

from tests.cases import BF16, F16

from .on_cards import ARCHS, card

FP8 = torch.float8_e4m3fn
LENGTHS = (200, 0, 65, 1)


def step(dtype, d, d_v, page_size=None, tokens=2):
    """q of some tokens, caches with NaN behind their ends, lengths, factors; pages in any order."""
    gen = torch.Generator().manual_seed(0)
    batch, capacity, heads_kv = len(LENGTHS), 240, 2
    q = torch.randn(batch, tokens, 6, d, generator=gen).to(dtype)
    caches = []
    for dim in (d, d_v):
        cache = 3 * torch.randn(batch, capacity, heads_kv, dim, generator=gen)
        for b, length in enumerate(LENGTHS):
            cache[b, length:] = torch.nan
        caches.append(cache.to(FP8))
    options = {
        "cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32),
        "k_descale": torch.rand(batch, heads_kv, generator=gen) + 0.1,
        "v_descale": torch.rand(batch, heads_kv, generator=gen) + 0.5,
        "causal": True,
        "return_lse": True,
    }
    options["k_descale"][2, 1] = 0.0  # to this head, all keys are alike
    if page_size is not None:
        order = torch.randperm(batch * capacity // page_size, generator=gen)
        caches = [c.view(torch.uint8).reshape(-1, page_size, *c.shape[2:]) for c in caches]
        caches = [c[order].view(FP8) for c in caches]
        options["block_table"] = order.argsort().to(torch.int32).view(batch, -1)
    return q, caches, options


def assert_same(fa4, call, arch, schedules, given=None, **changes):
    """The cpu variant's answer; the kernel writes it to `given` if that is there."""
    q, caches, options = call
    options = options | changes
    expected, expected_lse = fa4.flash_attn_with_kvcache(q, *caches, **options)
    for schedule in schedules:
        with card(fa4, arch, schedule) as emulator:
            out, lse = fa4.flash_attn_with_kvcache(q, *caches, out=given, **options)
        assert emulator.instructions
        assert given is None or out is given
        largest = float(expected.abs().max())
        torch.testing.assert_close(out, expected, rtol=0, atol=2.0**-7 * largest)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_core(fa4, arch, splits):
    dtype = (BF16, F16)[splits % 2]
    assert_same(fa4, step(dtype, 128, 128), arch, range(4), num_splits=splits)


@pytest.mark.parametrize(("d", "d_v"), [(64, 64), (96, 48), (192, 128), (256, 256)])
def test_dims(fa4, d, d_v):
    assert_same(fa4, step(BF16, d, d_v), "sm_120a", (0, 3), num_splits=2)


@pytest.mark.parametrize(("size", "d"), [(16, 128), (5, 64), (80, 192)])
def test_pages(fa4, size, d):
    """Odd boxes of narrow rows take a wider tile."""
    assert_same(fa4, step(BF16, d, d, size), "sm_121a", (0, 2), num_splits=2)


@pytest.mark.parametrize("splits", [1, 2])
def test_steps(fa4, splits):
    """The factor of K comes before what is not linear."""
    call = step(BF16, 64, 64)
    steps = {"softcap": 4.0, "s_aux": torch.randn(6).to(BF16), "window_size": (80, 0)}
    assert_same(fa4, call, "sm_90a", (0, 1), num_splits=splits, **steps)
