"""Where sequences lie: mixed layouts, rows of a cache, padding, tensors that TMA cannot reach."""

import pytest
import torch

from tests import acceptance, harness
from tests.cases import UNALIGNED_STRIDES, Case
from tests.oracle import Rule

from .on_cards import ARCHS, card, verify


@pytest.mark.parametrize("strides", UNALIGNED_STRIDES)
def test_copied_inputs(fa4, strides):
    """Unaligned, strided and expanded q, k and v are copied, and the answer is right."""
    turn = UNALIGNED_STRIDES.index(strides)
    case = Case(
        name=strides, strides=strides, d=64, seqlens_q=(30, 30), seqlens_k=(40, 40), heads=2,
        heads_kv=2, causal=True,
    )  # fmt: skip
    verify(fa4, case, ARCHS[turn % 3], (turn,))


def test_explain_says_what_is_copied(fa4):
    q = torch.randn(1, 30, 2, 64).bfloat16()
    k = torch.randn(1, 30, 1, 64).bfloat16().expand(1, 30, 2, 64)
    with card(fa4, "sm_120a"):
        plan = __import__(f"{fa4.__name__}.flash_attn4_cute.plan", fromlist=["plan"])
        problem = __import__(f"{fa4.__name__}.flash_attn4_cute.problem", fromlist=["problem"])
        tensors = problem.AttentionTensors(q=q, k=k, v=q)
        posed = problem.AttentionProblem.from_tensors(tensors, problem.AttentionOptions())
        text = plan.make_plan(posed).explain()
    assert "copied first: k, stride 0 of dimension 2" in text
    assert "copied first: q" not in text and "copied first: v" not in text


def test_out_of_odd_address_and_stride(fa4):
    """The result is copied to an out that cannot be stored to; rows of no sequence stay."""
    case = Case(
        name="odd_out", layout="varlen", d=64, seqlens_q=(20, 9), seqlens_k=(30, 30), heads=2,
        heads_kv=1,
    )  # fmt: skip
    call = harness.build(case, torch.device("cpu"))
    store = torch.full((29, 2, 65), 7.0).bfloat16()
    with card(fa4, "sm_90a"):
        out, lse = harness.run_uncut(fa4, call, out=store[..., 1:])
    harness.judge(call, harness.cut(call, out, lse))
    assert (store[..., 0] == 7.0).all()


@pytest.mark.parametrize("packed", ["q", "k"])
def test_one_side_packed(fa4, packed):
    """Packed queries over dense keys, and the reverse."""
    case = Case(
        name="mixed", layout="varlen", d=64, seqlens_q=(40, 40), seqlens_k=(60, 60), causal=True,
        heads=2, heads_kv=1, used_k=(60, 31),
    )  # fmt: skip
    call = harness.build(case, torch.device("cpu"))
    if packed == "q":
        call.k, call.v = (x.unflatten(0, (2, 60)) for x in (call.k, call.v))
        del call.tensors["cu_seqlens_k"], call.tensors["max_seqlen_k"]
    else:
        call.q = call.q.unflatten(0, (2, 40))
        del call.tensors["cu_seqlens_q"], call.tensors["max_seqlen_q"]
    with card(fa4, "sm_121a", 4) as emulator:
        answer = harness.run(fa4, call)
    assert emulator.instructions
    harness.judge(call, answer)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_and_padding_of_a_cache(fa4, arch):
    """cache_batch_idx and cache_leftpad; everything that does not count is NaN."""
    rows, pads, lengths = (3, 0, 2), (5, 0, 17), (60, 33, 17)
    q = torch.randn(3, 20, 2, 64).bfloat16()
    k, v = (torch.full((4, 70, 1, 64), torch.nan).bfloat16() for _ in range(2))
    for row, pad, end in zip(rows, pads, lengths, strict=True):
        k[row, pad:end], v[row, pad:end] = (torch.randn(end - pad, 1, 64) for _ in range(2))

    def int32(values):
        return torch.tensor(values, dtype=torch.int32)

    with card(fa4, arch, 3) as emulator:
        out, lse = fa4.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=int32(lengths), cache_batch_idx=int32(rows),
            cache_leftpad=int32(pads), causal=True, return_lse=True,
        )  # fmt: skip
    assert emulator.instructions
    for b, (row, pad, end) in enumerate(zip(rows, pads, lengths, strict=True)):
        ref = acceptance.reference(q[b], k[row, pad:end], v[row, pad:end], Rule(causal=True))
        acceptance.check(out[b], lse[b], ref, f"sequence {b}")
