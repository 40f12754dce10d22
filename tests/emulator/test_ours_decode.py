"""This repository's decode and combine kernels on every card that they run on."""

from dataclasses import replace

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli.case import Case, Inputs, judge, make_inputs

from .decoding import attend, case

ARCHS = ("sm_90a", "sm_120a", "sm_121a")


def assert_right(question: Case, arch: str, schedules) -> None:
    """pack_gqa asks for the decode kernel also where keys are not split."""
    from flash_attn4_cute.mask_rule import FULL, Band
    from flash_attn4_cute.problem import AttentionOptions, AttentionTensors

    inputs = make_inputs(question)
    bounded = question.left is not None or question.right is not None
    options = AttentionOptions(
        mask=Band(question.left, question.right) if bounded else FULL,
        num_splits=question.num_splits,
        pack_gqa=True,
        max_seqlen_q=question.seqlen_q if question.varlen else None,
        max_seqlen_k=question.seqlen_k if question.varlen else None,
        return_lse=True,
    )
    for schedule in schedules:
        tensors = AttentionTensors(q=inputs.q, k=inputs.k, v=inputs.v)
        if question.varlen:
            tensors.cu_seqlens_q, tensors.cu_seqlens_k = inputs.cu_q, inputs.cu_k
        with ptx_emulator.session(arch, schedule=schedule, strict=True) as emulator:
            verdict = judge(question, inputs, *attend(emulator, tensors, options))
        assert verdict.ok, f"schedule {schedule}: {verdict}"


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_core(arch, splits):
    """One token, five key blocks, the last of them partly filled, under eight schedules."""
    question = case(head_dim=128, num_splits=splits, seqlen_k=290, batch=1)
    assert_right(question, arch, range(8))


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("splits", [1, 2])
def test_dims(head_dim, splits):
    assert_right(case(head_dim=head_dim, num_splits=splits, dtype=torch.float16), "sm_120a", (0, 3))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("left", "right"), [(None, 0), (70, 0), (40, 3)])
def test_bands(left, right, splits):
    """Several tokens, masked, and more of them than keys in one of the sizes."""
    for seqlen_q, seqlen_k in ((5, 200), (5, 3)):
        question = case(
            left=left, right=right, num_splits=splits, seqlen_q=seqlen_q, seqlen_k=seqlen_k
        )
        assert_right(question, "sm_120a", (0, 5))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen_q"),
    [(1, 1, 1), (5, 1, 3), (12, 2, 4), (24, 1, 1), (40, 1, 1), (6, 2, 9)],
)
def test_packed_rows(heads, kv_heads, seqlen_q):
    """Groups of heads that fill a tile, do not, and take several; both tile heights."""
    question = case(heads=heads, kv_heads=kv_heads, seqlen_q=seqlen_q, right=0, num_splits=2)
    assert_right(question, "sm_121a", (0, 2))


@pytest.mark.parametrize("splits", [1, 7, 33])
def test_varlen(splits):
    """Packed sequences, the last one empty; more splits than any has blocks (FA#2760, FA#2761)."""
    question = case(
        varlen=True, batch=4, seqlen_q=3, seqlen_k=200, right=0, num_splits=splits
    )  # fmt: skip
    assert_right(question, "sm_90a", (0, 6))


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("schedule", [0, 8, 9])
def test_cache(splits, schedule):
    """Keys of a cache, NaN behind what is used; lengths -1 and 0; rows by cache_batch_idx."""
    from flash_attn4_cute.problem import AttentionOptions, AttentionTensors

    used, rows = (300, 65, 0, -1, 64), (4, 0, 2, 1, 5)
    question = case(batch=6, seqlen_k=320)
    cache = make_inputs(question)
    for length, row in zip(used, rows, strict=True):
        cache.k[row, max(length, 0) :] = torch.nan
        cache.v[row, max(length, 0) :] = torch.nan
    tensors = AttentionTensors(
        q=cache.q[:5].contiguous(),
        k=cache.k,
        v=cache.v,
        seqused_k=torch.tensor(used, dtype=torch.int32),
        kv_batch_idx=torch.tensor(rows, dtype=torch.int32),
    )
    options = AttentionOptions(num_splits=splits, pack_gqa=True, return_lse=True)
    with ptx_emulator.session("sm_120a", schedule=schedule, strict=True) as emulator:
        out, lse = attend(emulator, tensors, options)
    for b, (length, row) in enumerate(zip(used, rows, strict=True)):
        length = max(length, 0)
        one = Inputs(
            q=tensors.q[b : b + 1],
            k=cache.k[row : row + 1, :length],
            v=cache.v[row : row + 1, :length],
            sink=None,
            cu_q=torch.tensor([0, 1]),
            cu_k=torch.tensor([0, length]),
        )
        alone = replace(question, batch=1, seqlen_k=length)
        verdict = judge(alone, one, out[b : b + 1], lse[b : b + 1])
        assert verdict.ok, f"sequence {b}: {verdict}"


def test_same_bits_in_any_batch():
    """At a fixed number of splits a sequence's result does not depend on its neighbours."""
    from flash_attn4_cute.problem import AttentionOptions, AttentionTensors

    inputs = make_inputs(case(batch=3, seqlen_k=260))
    used = torch.tensor([260, 130, 200], dtype=torch.int32)

    def run(rows):
        tensors = AttentionTensors(
            q=inputs.q[rows].contiguous(), k=inputs.k[rows], v=inputs.v[rows], seqused_k=used[rows]
        )
        with ptx_emulator.session("sm_120a", schedule=1) as emulator:
            return attend(emulator, tensors, AttentionOptions(num_splits=3, return_lse=True))

    together, alone = run(slice(0, 3)), run(slice(1, 2))
    assert torch.equal(together[0][1:2], alone[0]) and torch.equal(together[1][1:2], alone[1])
