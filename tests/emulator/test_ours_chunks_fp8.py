"""Many queries on caches of e4m3, as chunked prefill asks: the forward kernel's."""

from dataclasses import replace

import pytest
import torch

from tests import harness
from tests.cases import BF16, F16, Case
from tests.test_block_sparse import check, kinds_of

from .on_cards import card, verify
from .test_ours_decode_fp8 import assert_same, step

BASE = Case(
    name="", seqlens_q=(70, 9), seqlens_k=(150, 150), used_k=(150, 33), heads=2, heads_kv=1, d=64,
    layout="varlen", causal=True, fp8=True,
)  # fmt: skip
STEPS = {"softcap": 15.0, "sink": True, "alibi": "batch"}
PAGED = {"layout": "paged", "page_size": 16}
# A row of the table each, and every layout: changes, card, schedules.
CASES = {
    "pages": (PAGED | {"num_splits": 2}, "sm_120a", (0, 3)),
    "odd_pages": (
        {"layout": "paged", "page_size": 5, "used_k": (65, 0), "d_v": 32},
        "sm_121a",
        (1, 4),
    ),
    "packed": ({"d": 128, "dtype": F16, "window": (50, 0)}, "sm_90a", (2, 5)),
    "latent": ({"d": 192, "d_v": 128}, "sm_120a", (5,)),
    "wide": ({"d": 256, "d_v": 208, "causal": False}, "sm_90a", (6,)),
    "steps": (STEPS | {"d": 96, "d_v": 80}, "sm_120a", (1, 6)),
    "dropout": (PAGED | {"dropout_p": 0.3, "num_splits": 2}, "sm_90a", (7,)),
}


@pytest.mark.parametrize("name", CASES)
def test_core(fa4, name):
    changes, arch, schedules = CASES[name]
    verify(fa4, replace(BASE, name=f"fp8_{name}", **changes), arch, schedules)


def test_a_cache_of_rows(fa4):
    """Rows by index, keys that start late, a factor of 0, out= and LSE."""
    q, caches, options = step(BF16, 64, 64, tokens=50)
    options["k_descale"][2] = 0.0  # all of a sequence's keys are alike
    options |= {
        "cache_batch_idx": torch.tensor([3, 1, 0, 2], dtype=torch.int32),
        "cache_seqlens": torch.tensor([1, 0, 200, 65], dtype=torch.int32),
        "cache_leftpad": torch.tensor([0, 0, 40, 3], dtype=torch.int32),
    }
    given = torch.full_like(q, torch.nan)
    assert_same(fa4, (q, caches, options), "sm_120a", (2,), given)


def test_block_lists(fa4):
    case = replace(
        BASE, name="lists", layout="dense", seqlens_q=(140,), seqlens_k=(210,), used_k=None, heads=1
    )
    kinds, device = kinds_of(case, (64, 32), True), torch.device("cpu")
    with card(fa4, "sm_120a", 6) as emulator:
        check(fa4, case, kinds, (64, 32), None, device)
    assert emulator.runs


def test_same_bits_in_any_batch(fa4):
    """FA#2595: a sequence's rows are the same beside others and alone."""
    case = replace(BASE, name="alone", num_splits=2)
    call = harness.build(case, torch.device("cpu"))
    with card(fa4, "sm_121a"):
        together = harness.run(fa4, call)
        call.q, call.k, call.v = (x[:n] for x, n in ((call.q, 70), (call.k, 150), (call.v, 150)))
        call.tensors |= {
            name: call.tensors[name][:n]
            for name, n in (
                ("seqused_k", 1), ("k_descale", 1), ("v_descale", 1), ("cu_seqlens_q", 2),
                ("cu_seqlens_k", 2),
            )
        }  # fmt: skip
        call.sequences = tuple(xs[:1] for xs in call.sequences)
        alone = harness.run(fa4, call)
    assert torch.equal(alone.outs[0], together.outs[0])
    assert torch.equal(alone.lses[0], together.lses[0])
