"""How many splits a decode launch takes, against what an H200 took for each number tried."""

import pytest

from flash_attn4_cute.splits import MAX_SPLITS, choose_splits, planned_length
from tests.test_errors import card, gpu_problem  # noqa: F401 (a fixture)

# (tiles, key blocks) -> splits -> microseconds; h_k 8 d128 bf16, graph replay, 2026-11-29
MEASURED = {
    (8, 16): {1: 10.15, 2: 8.8, 4: 7.13, 8: 6.58, 16: 8.57},
    (8, 32): {4: 8.93, 6: 8.31, 8: 7.66, 11: 7.43, 16: 9.48},
    (8, 128): {4: 20.64, 8: 13.8, 10: 13.18, 12: 13.22, 14: 13.45, 16: 15.08, 26: 13.24},
    (8, 2048): {8: 132.65, 10: 124.56, 12: 124.1, 14: 123.1, 16: 125.13, 32: 129.0},
    (16, 128): {3: 25.96, 4: 22.12, 5: 21.37, 6: 21.44, 8: 22.98, 13: 21.82},
    (24, 128): {2: 35.81, 3: 29.34, 4: 29.09, 5: 30.43},
    (32, 32): {1: 17.86, 2: 14.1, 3: 14.27, 4: 15.33},
    (32, 128): {1: 61.46, 2: 38.13, 3: 36.93, 4: 37.75, 8: 38.4},
    (48, 128): {1: 61.88, 2: 52.49},
    (64, 16): {1: 11.4, 2: 15.31, 4: 16.2},
    (64, 128): {1: 66.2, 2: 66.6, 3: 75.5, 4: 67.7},
    (96, 128): {1: 91.93, 2: 111.36, 3: 106.69},
    (128, 128): {1: 120.87, 2: 128.36},
    (144, 128): {1: 191.11, 2: 154.0, 3: 147.25, 4: 144.68},
    (192, 128): {1: 221.03, 2: 191.53},
    (256, 16): {1: 32.97, 2: 40.63},
    (512, 64): {1: 240.8, 4: 254.3, 8: 259.7},
}


@pytest.mark.parametrize("shape", MEASURED)
def test_close_to_the_best_that_was_tried(shape):
    took = MEASURED[shape]
    splits = choose_splits(*shape, num_sms=132, even=True)
    assert took[splits] <= 1.02 * min(took.values()), f"{splits} splits"


@pytest.mark.parametrize("num_sms", [48, 132, 170, 188])
def test_range(num_sms):
    for tiles in (0, 1, 7, 48, 200, 5000):
        for blocks in (0, 1, 2, 100, 5000):
            splits = choose_splits(tiles, blocks, num_sms, even=True)
            assert 1 <= splits <= max(1, min(blocks, MAX_SPLITS))


def test_a_long_sequence_among_short_ones_is_split():
    assert choose_splits(1024, 4096, 132, even=True) == 1
    assert 16 <= choose_splits(1024, 4096, 132, even=False) <= 24


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
