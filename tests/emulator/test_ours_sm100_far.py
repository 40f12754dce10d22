"""Index arithmetic of the tcgen05 kernel beyond 2^31, in memory that nothing else touches."""

import pytest
import torch

from tests import harness
from tests.cases import Case
from tests.test_layouts import FAR, far_apart

from .on_cards import card

CPU = torch.device("cpu")
ROWS = {"d": 64, "heads": 2, "heads_kv": 1, "causal": True}


def test_sequences_far_apart(fa4):
    """FA#2662, FA#2214: sequences of q, k, v and out; heads are packed."""
    case = Case(name="far", seqlens_q=(70,) * 2, seqlens_k=(130,) * 2, **ROWS)
    call = harness.build(case, CPU)
    call.q, call.k, call.v = (far_apart(x, FAR) for x in (call.q, call.k, call.v))
    out = far_apart(torch.zeros_like(call.q, memory_format=torch.contiguous_format), FAR)
    with card(fa4, "sm_100a", 1):
        _, lse = fa4.flash_attn_func(
            call.q, call.k, call.v, out=out, return_lse=True, **call.options
        )
    harness.judge(call, harness.cut(call, out, lse))


@pytest.mark.parametrize("page_size", [64, 100])
def test_pages_far_apart(fa4, page_size):
    """By TMA, and gathered."""
    layout = {"layout": "paged", "page_size": page_size, "seqlens_q": (70,)}
    case = Case(name="far_pages", seqlens_k=(2 * page_size - 3,), **layout, **ROWS)
    call = harness.build(case, CPU)
    pages = sorted(call.tensors["block_table"][0, :2].tolist())
    call.tensors["block_table"][0, :2] = torch.tensor(
        [pages.index(page) for page in call.tensors["block_table"][0, :2].tolist()]
    )
    call.k, call.v = (far_apart(x[pages], FAR) for x in (call.k, call.v))
    with card(fa4, "sm_103a", 1):
        answer = harness.run(fa4, call)
    harness.judge(call, answer)
