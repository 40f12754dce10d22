"""The tcgen05 kernel as pairs of CTAs that multiply as one, under several schedules."""

from dataclasses import replace

import pytest
import torch

import ptx_emulator
from flash_attn4_cute import plan
from flash_attn4_cute.sm100 import pairing
from ptx_emulator.cli import ours
from ptx_emulator.cli.case import judge, make_inputs
from tests.cases import BF16, F16, Case

from .on_cards import verify
from .test_ours import WINDOWS, assert_nothing_is_seen_behind_seqused, assert_right, case

ARCHS = ("sm_100a", "sm_103a")
STAGES = 4  # slots of the ring of K and V at head dimension 256: two blocks


def launch_of(question, arch):
    """The one launch that answers `question`, whose result is right."""
    inputs, launches = make_inputs(question), []
    with ptx_emulator.session(arch, strict=True) as emulator:
        run = emulator.host.on_launch
        emulator.host.on_launch = lambda launch: (launches.append(launch), run(launch))
        assert judge(question, inputs, *ours.forward(emulator, question, inputs)).ok
    (launch,) = launches
    return launch


def test_a_pair_is_what_runs():
    """Both CTAs of a cluster, with one product for both, and copies that signal the leader."""
    launch = launch_of(case(head_dim=256, heads=1, seqlen_q=130, seqlen_k=1), "sm_100a")
    assert launch.cluster == (2, 1, 1)
    for instruction in ("tcgen05.mma.cta_group::2", "tcgen05.commit.cta_group::2", "mapa"):
        assert instruction in launch.ptx
    assert "tcgen05.mma.cta_group::1" not in launch.ptx


@pytest.mark.parametrize(
    ("arch", "head_dim", "window", "schedules"),
    [
        ("sm_100a", 256, "causal", 16),
        ("sm_103a", 256, "window", 8),
        ("sm_103a", 136, "left", 2),
    ],
)
def test_masks(arch, head_dim, window, schedules):
    """An odd number of 128-row tiles, grouped heads, under up to 16 schedules."""
    left, right = WINDOWS[window]
    question = case(head_dim=head_dim, left=left, right=right, seqlen_q=300, seqlen_k=270)
    assert_right(question, arch, range(schedules))


@pytest.mark.parametrize("num_blocks", range(1, 2 * STAGES + 2))
def test_numbers_of_key_blocks(num_blocks):
    """The rings turn any number of times, from not at all on."""
    sizes = {"seqlen_q": 130, "seqlen_k": 128 * num_blocks - 1}
    assert_right(case(head_dim=256, heads=1, **sizes), ARCHS[num_blocks % 2], (num_blocks,))


def test_varlen():
    """Packed sequences of drawn lengths, the last one empty."""
    question = case(varlen=True, batch=4, seqlen_q=300, seqlen_k=400, right=0, dtype=torch.float16)
    question = replace(question, head_dim=256, head_dim_v=256)
    assert_right(question, "sm_103a", (0, 6, 7))


@pytest.mark.parametrize("schedule", [0, 8, 9])
def test_nan_behind_seqused(schedule):
    """Empty sequences between long ones; NaN in what does not count, in both halves of V."""
    question = case(batch=6, heads=1, seqlen_q=140, seqlen_k=300, head_dim=256, right=0)
    used_q, used_k = (140, 0, 33, 140, 1, 129), (101, 300, 0, 256, 1, 299)
    assert_nothing_is_seen_behind_seqused(question, used_q, used_k, "sm_100a", schedule)


@pytest.mark.parametrize("sizes", [(130, 1), (300, 1), (513, 513)])
def test_sizes(sizes):
    """A CTA without rows, rows that see nothing, several tiles a pair."""
    seqlen_q, seqlen_k = sizes
    question = case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, right=0, head_dim=256)
    assert_right(question, "sm_100a", (5,))


@pytest.mark.parametrize("head_dims", [(200, 144), (40, 256), (256, 8)])
def test_head_dims(head_dims):
    """What TMA fills up to the width of the tiles; a half of V may lie outside of it."""
    head_dim, head_dim_v = head_dims
    question = case(head_dim=head_dim, seqlen_q=130, seqlen_k=270, right=0)
    assert_right(replace(question, head_dim_v=head_dim_v), ARCHS[head_dim // 8 % 2], (2,))


STEPS: dict[str, dict] = {
    "softcap": {"softcap": 0.5, "fill": "peaked", "causal": True},
    "sink": {"sink": True, "window": (40, None)},
    "dropout": {"dropout_p": 0.2},
    "all": {"softcap": 15.0, "sink": True, "alibi": "head", "layout": "varlen"},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(fa4, name):
    """What depends on the number of a row or a key."""
    turn = list(STEPS).index(name)
    lengths = {"seqlens_q": (300, 140), "seqlens_k": (150, 150), "heads": 2, "heads_kv": 1}
    if STEPS[name].get("layout") != "varlen":
        lengths = {**lengths, "seqlens_q": (300,), "seqlens_k": (150,)}
    question = Case(name=name, d=256, dtype=(BF16, F16)[turn % 2], **{**lengths, **STEPS[name]})
    verify(fa4, question, ARCHS[turn % 2], (turn,))


@pytest.fixture
def everywhere(monkeypatch):
    """Pairs wherever there is a row of them, not only where they pay."""
    monkeypatch.setattr(pairing, "pays_in_pairs", lambda row, problem: True)


@pytest.mark.parametrize(
    ("arch", "head_dims", "window", "schedules"),
    [
        ("sm_100a", (128, 128), "causal", 16),
        ("sm_103a", (192, 128), "full", 4),
        ("sm_103a", (104, 128), "window", 2),
        ("sm_100a", (192, 120), "left", 2),
    ],
)
def test_two_tiles_a_cta(everywhere, arch, head_dims, window, schedules):
    """Four tiles a pair, the last without rows; grouped heads."""
    left, right = WINDOWS[window]
    question = case(head_dim=head_dims[0], left=left, right=right, seqlen_q=300, seqlen_k=270)
    question = replace(question, head_dim_v=head_dims[1])
    assert_right(question, arch, range(schedules))


@pytest.mark.parametrize("num_blocks", [1, 2, 8, 9, 17])
def test_numbers_of_key_blocks_with_two_tiles(everywhere, num_blocks):
    """Up to twice the ring's eight slots, and one more."""
    sizes = {"seqlen_q": 257, "seqlen_k": 128 * num_blocks - 1}
    assert_right(case(head_dim=128, heads=1, **sizes), ARCHS[num_blocks % 2], (num_blocks,))


def test_causal_tiles_in_turn_with_two_tiles(everywhere, monkeypatch):
    """One pair takes three pieces of work, the longest first, the last rows of which are none."""
    monkeypatch.setattr(ours, "NUM_SMS", 2)
    question = case(heads=1, kv_heads=1, head_dim=192, seqlen_q=1100, seqlen_k=1100, right=0)
    assert_right(replace(question, head_dim_v=128), "sm_103a", (3,))


def test_varlen_with_two_tiles(everywhere):
    """Packed sequences of drawn lengths, the last one empty; NaN behind used ones."""
    question = case(varlen=True, batch=4, seqlen_q=300, seqlen_k=400, right=0, dtype=torch.float16)
    assert_right(question, "sm_103a", (0, 6))
    question = case(batch=4, heads=1, seqlen_q=300, seqlen_k=300, right=0)
    used_q, used_k = (300, 0, 257, 140), (101, 300, 0, 256)
    assert_nothing_is_seen_behind_seqused(question, used_q, used_k, "sm_100a", 9)


@pytest.mark.parametrize(
    ("changes", "pair"),
    [
        ({"seqlen_q": 512}, True),
        ({"seqlen_q": 600}, False),  # a third tile of 256 rows, for which a pair would need four
        ({"seqlen_q": 5000}, True),
        ({"seqlen_q": 512, "right": 0}, False),
        ({"seqlen_q": 4096, "seqlen_k": 4096, "right": 0}, True),
        ({"seqlen_q": 4096, "seqlen_k": 4095, "right": 0}, False),
        ({"seqlen_q": 2048, "seqlen_k": 2048, "head_dim": 192, "right": 0}, True),
        ({"seqlen_q": 2048, "seqlen_k": 2047, "head_dim": 192, "right": 0}, False),
        ({"seqlen_q": 4096, "seqlen_k": 4096, "left": 900, "right": 0}, False),
        ({"seqlen_q": 512, "varlen": True}, False),
        ({"seqlen_q": 512, "head_dim": 64}, False),
    ],
)
def test_where_pairs_pay(monkeypatch, changes, pair):
    """As in `pairing.pays_in_pairs`, for what both could do."""
    question = case(**{"seqlen_k": 64, **changes})
    question = replace(question, head_dim_v=min(question.head_dim, 128))
    inputs, plans = make_inputs(question), []

    def stop(problem, tensors):
        plans.append(plan.make_plan(problem))
        raise StopIteration

    monkeypatch.setattr("flash_attn4_cute.launch.forward", stop)
    with ptx_emulator.session("sm_100a") as emulator, pytest.raises(StopIteration):
        ours.forward(emulator, question, inputs)
    assert (plans[0].key.cfg.ctas == 2) is pair
