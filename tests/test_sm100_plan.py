"""Which kernel the plan picks on a B200, and what it adds to the row of the table."""

import dataclasses
import importlib

import pytest

from tests.test_errors import card, gpu_problem  # noqa: F401 (a fixture)

B200 = (10, 0)


def paged(fa4, page_size, **changes):
    """A chunk of 128 queries behind a paged cache of up to 4096 keys."""
    layout = fa4.flash_attn4_cute.problem.Layout.PAGED
    known = {"kv_layout": layout, "page_size": page_size, "has_seqused_k": True, "seqlen_k": 4096}
    return gpu_problem(fa4, **{**known, **changes})


@pytest.mark.parametrize(
    ("page_size", "box_n", "gathers"),
    [(16, 16, False), (128, 128, False), (192, 64, False), (256, 128, False)]
    + [(1, 1, True), (4, 1, True), (100, 1, True)],
)
def test_pages(fa4, card, page_size, box_n, gathers):  # noqa: F811
    """By TMA in boxes that lie in one page, or row by row where boxes would be too small."""
    cfg = card(B200).make_plan(paged(fa4, page_size, num_heads_kv=1)).key.cfg
    assert (cfg.family, cfg.box_n, cfg.gathers) == ("sm100", box_n, gathers)


def test_few_rows_and_other_cards_decode(fa4, card):  # noqa: F811
    few = paged(fa4, 16, seqlen_q=1)
    assert type(card(B200).make_plan(few).key).__name__ == "DecodeKey"
    assert type(card((12, 0)).make_plan(paged(fa4, 16, seqlen_q=64)).key).__name__ == "DecodeKey"
    assert type(card((12, 0)).make_plan(paged(fa4, 16, seqlen_q=65)).key).__name__ == "ForwardKey"
    # What must not depend on the number of queries takes the same kernel for few.
    apart = paged(fa4, 16, seqlen_q=1, pack_gqa=False, num_splits=1)
    assert card(B200).make_plan(apart).key.family == "sm100"


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, 4),  # causal, and as few tiles
        ({"pack_gqa": False}, 1),
        ({"num_heads": 3}, 3),  # 128 queries of 3 heads: two tiles instead of three
        ({"num_heads": 3, "seqlen_q": 8192}, 1),  # idle rows cost tiles
        ({"num_heads": 3, "seqlen_q": 8192, "pack_gqa": True}, 3),
        ({"num_heads": 48, "seqlen_q": 8192, "has_seqused_q": True}, 1),  # 32 of 128 rows idle
        ({"num_heads": 7, "seqlen_q": 8192, "has_seqused_q": True}, 7),
        ({"num_heads": 130}, 1),
    ],
)
def test_packing(fa4, card, changes, group):  # noqa: F811
    plan = card(B200).make_plan(gpu_problem(fa4, num_heads_kv=1, **changes))
    assert plan.key.cfg.group == group
    assert (f"of {group} heads" in plan.explain()) == (group > 1)


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        ({"num_splits": 3}, 3),
        ({"num_splits": 1}, 1),
        ({"seqlen_k": 131072}, range(8, 257)),  # one CTA would stream 1024 blocks alone
        ({"seqlen_k": 131072, "seqlen_q": 8192}, 1),  # tiles enough for the card
        ({"seqlen_k": 256}, 1),  # nothing to gain
    ],
)
def test_splits(fa4, card, changes, splits):  # noqa: F811
    plan = card(B200).make_plan(paged(fa4, 16, num_heads_kv=1, **changes))
    assert plan.num_splits in (splits if isinstance(splits, range) else (splits,))
    assert (plan.key.merged_dim == 64) == (plan.num_splits > 1)
    assert f"splits: {plan.num_splits}" in plan.explain()


@pytest.mark.parametrize(
    ("changes", "counts", "bounded"),
    [
        ({"seqlen_q": 16384}, False, True),  # 256 tiles, equally long: fixed shares
        ({"seqlen_q": 16384, "q_layout": "VARLEN"}, True, True),
        ({"seqlen_q": 16384, "kv_layout": "VARLEN"}, True, True),
        ({"seqlen_q": 16384, "has_seqused_q": True}, True, True),
        ({"seqlen_q": 16384, "has_seqused_k": True}, True, True),
        ({"seqlen_q": 8192, "has_seqused_k": True}, True, False),  # 128 tiles: a CTA for each
        ({"seqlen_q": 8192, "has_seqused_k": True, "num_splits": 2}, True, True),
        ({"seqlen_q": 16384, "has_seqused_k": True, "head_dim": 256}, False, False),  # pairs
    ],
)
def test_tiles_from_a_counter(fa4, card, changes, counts, bounded):  # noqa: F811
    """Where sequences differ; CTAs are as many as SMs where there are more tiles."""
    layout = fa4.flash_attn4_cute.problem.Layout
    changes = {name: getattr(layout, str(v), v) for name, v in changes.items()}
    plan = card(B200).make_plan(gpu_problem(fa4, **{"num_splits": 1, **changes}))
    assert plan.key.counts_tiles == counts
    assert (plan.max_ctas == 132) == bounded, plan.max_ctas


@pytest.mark.parametrize("packed", ["q_layout", "kv_layout"])
def test_a_cta_for_each_tile_where_sequences_differ(fa4, card, packed):  # noqa: F811
    """Of queries or of keys; without a counter, shares dealt at the start would be unequal."""
    layout = fa4.flash_attn4_cute.problem.Layout
    problem = gpu_problem(fa4, seqlen_q=16384)
    plan = card((9, 0))
    assert plan.make_plan(problem).max_ctas == 132
    problem = dataclasses.replace(problem, **{packed: layout.VARLEN}, num_splits=1)
    assert plan.make_plan(problem).max_ctas > 132


def test_dropout_in_packed_tiles(fa4, card):  # noqa: F811
    """The tcgen05 kernel packs heads beside all else, of the mma.sync kernels only the decode's."""
    problem = paged(fa4, 16, dropout_p=0.1, num_splits=2, pack_gqa=True, num_heads_kv=1)
    chosen = card(B200).make_plan(problem)
    assert chosen.key.family == "sm100" and chosen.key.cfg.group == 4
    with pytest.raises(NotImplementedError, match="dropout_p=0.1 .*pack_gqa"):
        card((12, 0)).make_plan(problem)


@pytest.mark.parametrize("variant", ["sm100a", "sm103a"])
def test_tensor_memory(fa4, variant):
    """S, O and P where it is apart share no column; elsewhere P takes the first half of its S."""
    package = f"{fa4.flash_attn4_cute.__name__}.sm100"
    tiles = importlib.import_module(f"{package}.tiles")
    tmem = importlib.import_module(f"{package}.tmem")
    for row in (*tiles.FORWARD_ROWS[variant], *tiles.PAIR_ROWS[variant]):
        found = tmem.TmemMap.of(row)
        used = [range(s, s + 128) for s in found.s]
        used += [range(o, o + row.head_dim_v) for o in found.o]
        if row.p_apart:
            used += [range(p, p + 64) for p in found.p]
        else:
            assert found.p == found.s
        columns = [column for part in used for column in part]
        assert len(columns) == len(set(columns)) and max(columns) < 512, row
        assert [found.p_at(slot) for slot in (0, 1)] == list(found.p)
        assert [found.s_at(slot) for slot in (0, 1)] == list(found.s)
    apart = [row.head_dim for row in tiles.FORWARD_ROWS[variant] if row.p_apart]
    assert apart == [64], "where there is room"


@pytest.mark.parametrize("capability", [(9, 0), B200])
@pytest.mark.parametrize("pack_gqa", [None, True])
def test_more_tiles_than_a_launch_counts(fa4, card, capability, pack_gqa):  # noqa: F811
    """Packed queries without a bound: as many of each sequence as there are in all."""
    layout = fa4.flash_attn4_cute.problem.Layout.VARLEN
    known = {"q_layout": layout, "kv_layout": layout, "num_heads": 64, "num_heads_kv": 8}
    plan = card(capability).make_plan
    few = gpu_problem(fa4, batch=1 << 17, seqlen_q=1, pack_gqa=pack_gqa, **known)
    assert plan(few).num_splits >= 1
    with pytest.raises(NotImplementedError, match=f"max_seqlen_q={1 << 17}.*longest sequence"):
        plan(dataclasses.replace(few, seqlen_q=1 << 17))
