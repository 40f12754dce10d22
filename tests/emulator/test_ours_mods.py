"""score_mod, mask_mod and dropout in the kernels: the cpu variant says what they mean."""

import cutlass
import cutlass.cute as cute
import pytest
import torch

from tests import harness
from tests.cases import BF16, F16, Case
from tests.oracle import Rule
from tests.test_mods import MODS, from_table

from .on_cards import ARCHS, card

CPU = torch.device("cpu")


def call_with(rule, layout, **changes):
    """A call by `rule` on sequences of 70 queries and 90 keys, and its keyword arguments."""
    options = {"d": 32, "seqlens_q": (70, 70), "seqlens_k": (90, 90), "dtype": BF16, **changes}
    call = harness.build(Case(name="mods", layout=layout, **options), CPU)
    table = [torch.randn(4, 90)] if rule.score_mod is from_table else None
    call.rule = Rule(**{**vars(rule), "aux_tensors": table})
    arguments = {
        "score_mod": rule.score_mod,
        "mask_mod": rule.mask_mod,
        "aux_tensors": table,
        "causal": rule.causal,
        "window_size": rule.window,
        "softcap": rule.softcap,
        "softmax_scale": rule.softmax_scale,
    }
    return call, arguments


@pytest.mark.parametrize("name", MODS)
def test_mods(fa4, name):
    """The same functions as on the CPU, without a change; cards and layouts take turns."""
    turn = list(MODS).index(name)
    call, arguments = call_with(MODS[name], ("dense", "varlen")[turn % 2])
    with card(fa4, ARCHS[turn % 3], turn) as emulator:
        answer = harness.run(fa4, call, **arguments)
    assert emulator.instructions
    harness.judge(call, answer)


@cute.jit
def upstream_score_mod(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Written for upstream's kernels: fragments, typed loads, cute.math."""
    bias = aux_tensors[0]
    place = cute.make_rmem_tensor(1, cutlass.Int32)
    place.store(h_idx)
    loaded = cute.make_rmem_tensor(1, bias.element_type)
    loaded[0] = bias[place[0]]
    slope = cute.math.exp2(-loaded.load().to(cutlass.Float32))
    return score.to(cutlass.Float32) - slope * (q_idx - kv_idx).to(cutlass.Float32)


@cute.jit
def upstream_mask_mod(b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    offset = cute.full_like(q_idx, seqlen_info.seqlen_k - seqlen_info.seqlen_q)
    return kv_idx <= q_idx + offset


def test_mods_written_for_upstream(fa4):
    bias = torch.rand(4).to(F16)

    def same(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        return score - torch.exp2(-bias.double()[h]) * (q_idx - kv_idx)

    call, _ = call_with(Rule(score_mod=same, causal=True), "dense")
    arguments = {"score_mod": upstream_score_mod, "mask_mod": upstream_mask_mod}
    with card(fa4, "sm_120a", 1):
        answer = harness.run(fa4, call, aux_tensors=[bias], causal=False, **arguments)
    harness.judge(call, answer)


def test_fa2298_two_closures_of_one_function(fa4):
    """FA#2298: a cache keyed by the function's source gave the first closure's answer again."""
    for by in (0, 7):
        sizes = {"seqlens_q": (40,), "seqlens_k": (40,), "heads": 1, "heads_kv": 1}
        call, _ = call_with(Rule(window=(None, 20 + by)), "dense", **sizes)
        with card(fa4, "sm_121a"):
            answer = harness.run(
                fa4,
                call,
                window_size=None,
                mask_mod=lambda b, h, i, j, s, a, by=by: j <= i + by + 20,
            )
        harness.judge(call, answer)


@pytest.mark.parametrize("arch", ARCHS)
def test_dropout_keeps_what_the_cpu_variant_keeps(fa4, arch):
    """Element by element: with V = 1 the output is the mask, scaled."""
    q, k = torch.zeros(2, 40, 2, 32).bfloat16(), torch.zeros(2, 200, 1, 32).bfloat16()
    v = torch.eye(200).bfloat16().expand(2, 1, 200, 200).transpose(1, 2).contiguous()
    torch.manual_seed(3)
    expected = fa4.flash_attn_func(q, k, v, dropout_p=0.3)
    torch.manual_seed(3)
    with card(fa4, arch, 2) as emulator:
        found, lse = fa4.flash_attn_func(q, k, v, dropout_p=0.3, return_lse=True)
    assert emulator.instructions
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 200).log())


def test_dropout_of_packed_sequences(fa4):
    case = Case(
        name="dropout", layout="varlen", d=64, seqlens_q=(40, 21), seqlens_k=(75, 42), causal=True
    )
    call = harness.build(case, CPU)
    torch.manual_seed(3)
    out, lse = harness.run_uncut(fa4, call, dropout_p=0.3)
    torch.manual_seed(3)
    with card(fa4, "sm_121a", 2):
        found, found_lse = harness.run_uncut(fa4, call, dropout_p=0.3)
    torch.testing.assert_close(found, out, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-4)
