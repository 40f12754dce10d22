"""This repository's kernel on every card that it runs on, under several schedules."""

from dataclasses import replace

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli import ours
from ptx_emulator.cli.case import Case, judge, make_inputs
from ptx_emulator.cli.ours import kernels_on

ARCHS = ("sm_90a", "sm_120a", "sm_121a")
WINDOWS = {"full": (None, None), "causal": (None, 0), "window": (40, 10), "left": (70, None)}


def case(**changes):
    options = {
        "dtype": torch.bfloat16,
        "batch": 1,
        "heads": 2,
        "kv_heads": 1,
        "seqlen_q": 300,
        "seqlen_k": 200,
        "head_dim": 128,
        **changes,
    }
    return Case(head_dim_v=options["head_dim"], **options)


def assert_right(question, arch, schedules):
    inputs = make_inputs(question)
    for schedule in schedules:
        session = ptx_emulator.session(arch, schedule=schedule, strict="fences")
        with session as emulator:
            verdict = judge(question, inputs, *ours.forward(emulator, question, inputs))
        assert verdict.ok, f"schedule {schedule}: {verdict}"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_masks(head_dim, window):
    """Each mask on each width; the cards take turns."""
    left, right = WINDOWS[window]
    arch = ARCHS[(head_dim // 32 + list(WINDOWS).index(window)) % 3]
    sizes = {"seqlen_q": 130, "seqlen_k": 270}
    question = case(head_dim=head_dim, left=left, right=right, **sizes)
    assert_right(question, arch, (0, 1, 2))


@pytest.mark.parametrize("arch", ARCHS)
def test_cards(arch):
    assert_right(case(left=None, right=0, dtype=torch.float16), arch, (0, 3, 4))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (257, 64), (300, 1)])
def test_sizes(sizes):
    """One row, one key, more rows than keys (rows that see nothing), a row beyond a tile."""
    seqlen_q, seqlen_k = sizes
    question = case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, left=None, right=0, head_dim=64)
    assert_right(question, "sm_120a", (0, 5))


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_120a", 128), ("sm_90a", 96)])
def test_varlen(arch, head_dim):
    """Packed sequences, the last one empty."""
    question = case(varlen=True, batch=4, seqlen_q=90, seqlen_k=150, head_dim=head_dim, right=0)
    assert_right(question, arch, (0, 6, 7))


def padded(question, used_q, used_k):
    """Inputs of lengths used_q, used_k, with NaN in every row behind them."""
    inputs = make_inputs(question)
    for b, (rows, keys) in enumerate(zip(used_q, used_k, strict=True)):
        inputs.q[b, rows:] = torch.nan
        inputs.k[b, keys:] = torch.nan
        inputs.v[b, keys:] = torch.nan
    return inputs


def assert_nothing_is_seen_behind_seqused(question, used_q, used_k, arch, schedule):
    """The result of each sequence is that of the sequence alone, whatever lies behind it."""
    from flash_attn4_cute.mask_rule import Band
    from flash_attn4_cute.problem import AttentionOptions, AttentionProblem, AttentionTensors

    inputs = padded(question, used_q, used_k)
    tensors = AttentionTensors(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        seqused_q=torch.tensor(used_q, dtype=torch.int32),
        seqused_k=torch.tensor(used_k, dtype=torch.int32),
    )
    options = AttentionOptions(mask=Band(None, question.right), return_lse=True)
    problem = AttentionProblem.from_tensors(tensors, options)
    tensors.out = torch.full_like(inputs.q, 7.0)
    tensors.lse = torch.full((question.batch, question.heads, question.seqlen_q), 7.0)
    session = ptx_emulator.session(arch, schedule=schedule, strict="fences")
    with session as emulator, kernels_on(emulator) as forward:
        forward(problem, tensors)
    for b, (rows, keys) in enumerate(zip(used_q, used_k, strict=True)):
        part = replace(question, batch=1, seqlen_q=rows, seqlen_k=keys)
        pieces = (
            inputs.q[b : b + 1, :rows],
            inputs.k[b : b + 1, :keys],
            inputs.v[b : b + 1, :keys],
        )
        ends = (torch.tensor([0, rows]), torch.tensor([0, keys]))
        q, k, v = pieces
        alone = type(inputs)(q=q, k=k, v=v, sink=None, cu_q=ends[0], cu_k=ends[1])
        verdict = judge(
            part, alone, tensors.out[b : b + 1, :rows], tensors.lse[b : b + 1, :, :rows]
        )
        assert verdict.ok, verdict


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("schedule", [0, 8, 9])
def test_nan_behind_seqused(head_dim, schedule):
    """What lies behind seqused_q and seqused_k must not be seen, empty sequences included."""
    question = case(batch=3, seqlen_q=140, seqlen_k=150, head_dim=head_dim, right=0)
    used_q, used_k = (140, 33, 0), (101, 150, 0)
    assert_nothing_is_seen_behind_seqused(question, used_q, used_k, "sm_120a", schedule)
