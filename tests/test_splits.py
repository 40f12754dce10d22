"""How many splits a decode launch takes, against what an H200 took for each number tried."""

import pytest

from flash_attn4_cute.decode_tiles import decode_rows
from flash_attn4_cute.splits import (
    MAX_SPLITS,
    Pace,
    choose_splits,
    fits,
    modelled_time,
    planned_length,
)
from tests.decode_times import MEASURED
from tests.test_errors import card, gpu_problem  # noqa: F401 (a fixture)

PLAIN = (Pace(1.8, 2),)


def rows(kv_bytes, head_dim):
    """Configurations of 16 rows on an H200, by what the table of times calls them."""
    table = decode_rows(kv_bytes, "sm90a")[head_dim]
    return {(kv_bytes, head_dim, cfg.kv_stages): cfg for cfg in table if cfg.rows == 16}


@pytest.mark.parametrize(
    ("kind", "shape"),
    dict.fromkeys((name[:2], shape) for name, times in MEASURED.items() for shape in times),
)
def test_close_to_the_best_that_was_tried(kind, shape):
    """Splits and, where there are two, the configuration."""
    tiles, keys = shape
    configs = {name: cfg for name, cfg in rows(*kind).items() if shape in MEASURED[name]}
    took = {
        (cfg.pace, splits): us
        for name, cfg in configs.items()
        for splits, us in MEASURED[name][shape].items()
        if fits(cfg.pace, splits, tiles, 132)
    }
    blocks = -(-keys // next(iter(configs.values())).block_n)
    best = min(took, key=lambda choice: modelled_time(tiles, blocks, 132, *choice))
    assert took[best] <= 1.025 * min(took.values()), best
    assert all(name in MEASURED for name in rows(*kind))


def test_blocks_are_those_of_the_configuration_that_is_taken(fa4, card):  # noqa: F811
    """With 32 rows of d 64 they are half as long as with 16."""
    heads = {"num_heads": 32, "num_heads_kv": 1, "seqlen_q": 1, "seqlen_k": 4096, "num_splits": 0}
    plan = card((9, 0)).make_plan(gpu_problem(fa4, **heads))
    cfg = plan.key.cfg
    assert (cfg.rows, cfg.block_n) == (32, 64)
    pace = (Pace(cfg.rate, cfg.ctas_per_sm),)
    right, wrong = (choose_splits(1, 4096 // n, 132, True, pace)[1] for n in (64, 128))
    assert plan.num_splits == right != wrong


@pytest.mark.parametrize("num_sms", [48, 132, 170, 188])
def test_range(num_sms):
    for tiles in (0, 1, 7, 48, 200, 5000):
        for blocks in (0, 1, 2, 100, 5000):
            _, splits = choose_splits(tiles, blocks, num_sms, True, PLAIN)
            assert 1 <= splits <= max(1, min(blocks, MAX_SPLITS))


def test_a_long_sequence_among_short_ones_is_split():
    assert choose_splits(1024, 4096, 132, True, PLAIN) == (*PLAIN, 1)
    assert 16 <= choose_splits(1024, 4096, 132, False, PLAIN)[1] <= 24


def test_a_configuration_for_few_ctas_is_taken_for_few_only():
    deep = Pace(2.07, 1, max_load=0.5)
    for tiles, splits in ((64, 1), (66, 1), (67, None), (500, None)):
        pace, chosen = choose_splits(tiles, 512, 132, True, (deep, *PLAIN))
        assert (pace == deep) == (splits is not None)
        assert splits in (None, chosen)


def test_planned_lengths_are_close_bounds_and_few():
    lengths = range(1, 1 << 17)
    planned = [planned_length(n) for n in lengths]
    assert all(0 <= p - n < max(64, n / 32) for n, p in zip(lengths, planned, strict=True))
    assert len(set(planned)) <= 240
    assert [planned_length(x) for x in (0, -5, None, True)] == [0, -5, None, True]


@pytest.mark.parametrize("seqlen_q", [1, 300])
@pytest.mark.parametrize("arch", [(9, 0), (10, 0), (12, 0)])
def test_a_plan_is_that_of_the_planned_length(fa4, card, arch, seqlen_q):  # noqa: F811
    """So whoever comes first, all calls that are known by it would have had its plan."""
    problem = fa4.flash_attn4_cute.problem
    band, layouts = problem.Band(20000, 0), problem.Layout
    for layout, page_size in ((layouts.VARLEN, None), (layouts.PAGED, 16)):
        asked = {"kv_layout": layout, "page_size": page_size, "mask": band, "seqlen_q": seqlen_q}
        plans = [
            card(arch).make_plan(gpu_problem(fa4, num_heads_kv=1, **asked, seqlen_k=n))
            for n in (3969, 4000, 4032, 8100, 8192)
        ]
        assert plans[0] == plans[1] == plans[2] and plans[3] == plans[4]
