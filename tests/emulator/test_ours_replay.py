"""What a CUDA graph does, emulated: the launches of one call again, with lengths changed in place.

fi#4002: a plan or an argument that goes stale. Nothing but the tensors' contents may decide.
"""

import math
import random
from contextlib import contextmanager

import pytest
import torch

from tests.cases import BF16, FP8

from .on_cards import card

CAPACITY, SIZE, BATCH, HEADS, HEADS_KV, D = 96, 16, 2, 4, 2, 64
EDGES = [(-1, -1), (0, 0), (95, 1), (64, 65), (0, -1)]


def lengths_of(replay: int, most: int) -> tuple[int, ...]:
    draw = random.Random(replay)
    if replay < len(EDGES):
        return tuple(min(n, most) for n in EDGES[replay])
    return tuple(draw.randint(-1, most) for _ in range(BATCH))


@contextmanager
def recorded(emulator):
    """The launches of the calls inside, as [(compiled kernel, arguments)]."""
    launches, run = [], emulator.run

    def keep(function, arguments):
        launches.append((function, arguments))
        return run(function, arguments)

    emulator.run = keep
    try:
        yield launches
    finally:
        emulator.run = run


def step(layout: str):
    """q, [cache], keyword arguments; with "append", new tokens among them."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=gen).to(BF16)

    options = {"cache_seqlens": torch.full((BATCH,), 40, dtype=torch.int32), "causal": True}
    shape = (BATCH, CAPACITY, HEADS_KV, D)
    if layout != "dense":
        pages = BATCH * CAPACITY // SIZE
        shape = (pages, SIZE, HEADS_KV, D)
        order = torch.randperm(pages, generator=gen).to(torch.int32)
        options["block_table"] = order.view(BATCH, -1)
    cache = [normal(*shape) for _ in range(2)]
    queries = 66 if layout == "chunks" else 1
    if layout == "append":
        options |= {"k": normal(BATCH, 1, HEADS_KV, D), "v": normal(BATCH, 1, HEADS_KV, D)}
        options |= {"rotary_cos": normal(CAPACITY, 8), "rotary_sin": normal(CAPACITY, 8)}
    if layout == "fp8":
        cache = [x.to(FP8) for x in cache]
        options["k_descale"] = torch.rand(BATCH, HEADS_KV, generator=gen) + 0.5
    return normal(BATCH, queries, HEADS, D), cache, options


@pytest.mark.parametrize("layout", ["dense", "paged", "fp8", "append", "chunks"])
def test_captured_at_one_length_replayed_at_others(fa4, layout):
    """Split keys, as captured at 40 tokens; longer, empty and padding sequences included."""
    q, cache, options = step(layout)
    reference = [x.clone() for x in cache]
    lengths = options["cache_seqlens"]
    options |= {"return_lse": True, "num_splits": 2}
    fa4.flash_attn_with_kvcache(q, *reference, **options)
    with card(fa4, "sm_120a", 1) as emulator:
        with recorded(emulator) as launches:
            out, lse = fa4.flash_attn_with_kvcache(q, *cache, **options)
        assert len(launches) == (2 if layout == "append" else 1)
        for replay in range(2, 4) if layout == "chunks" else range(10):
            lengths.copy_(torch.tensor(lengths_of(replay, CAPACITY - (layout == "append"))))
            out.fill_(math.nan)
            for function, arguments in launches:
                emulator.run(function, arguments)
            found, found_lse = out.clone(), lse.clone()
            expected, expected_lse = on_cpu(fa4, q, reference, options)
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)
            torch.testing.assert_close(found_lse, expected_lse, rtol=1e-5, atol=1e-4)
            if layout == "append":
                for x, y in zip(cache, reference, strict=True):
                    torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-2)


def on_cpu(fa4, q, cache, options):
    """The cpu variant's answer, also inside of `card`."""
    import importlib

    execute = importlib.import_module(f"{fa4.__name__}.execute")
    before, execute._variant = execute._variant, lambda problem: execute._CPU
    try:
        return fa4.flash_attn_with_kvcache(q, *cache, **options)
    finally:
        execute._variant = before
