"""Published bugs, in the compiled kernels of every card; tests/README.md has the list."""

import zlib

import pytest
import torch

from tests import harness, regressions
from tests.cases import Case

from .on_cards import ARCHS, card, verify


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("row", "case"), regressions.PARAMETERS, ids=regressions.NAMES)
def test_published_bug(fa4, row, case, arch):
    """Under one of eight schedules each; a case that the kernels refuse must be refused by name."""
    if missing := case.missing_on_gpu():
        call = harness.build(case, torch.device("cpu"))
        with card(fa4, arch), pytest.raises(NotImplementedError, match=missing):
            harness.run(fa4, call)
        return
    verify(fa4, case, arch, (zlib.crc32(f"{case.name}{arch}".encode()) % 8,))


@pytest.mark.parametrize("arch", ARCHS)
def test_zero_lengths_under_many_schedules(fa4, arch):
    """cfe#575: a wait on a parity that two phases had overtaken."""
    case = Case(
        name="zeros", d=64, layout="varlen", heads=1, heads_kv=1, causal=True,
        seqlens_q=(5, 0, 130, 0, 1), seqlens_k=(0, 7, 200, 64, 65),
    )  # fmt: skip
    verify(fa4, case, arch, range(8))


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_do_not_depend_on_the_batch(fa4, arch):
    """FA#2595: each sequence alone, and a chunk of its queries, give the bits that they gave."""
    case = Case(
        name="rows", d=64, heads=2, heads_kv=1, causal=True, seqlens_q=(150,) * 2,
        seqlens_k=(150,) * 2,
    )  # fmt: skip
    call = harness.build(case, torch.device("cpu"))
    options = {"causal": True, "num_splits": 1, "pack_gqa": False, "return_lse": True}
    with card(fa4, arch, 3):
        out, lse = fa4.flash_attn_func(call.q, call.k, call.v, **options)
    with card(fa4, arch, 5):
        one = slice(1, 2)
        alone, alone_lse = fa4.flash_attn_func(call.q[one], call.k[one], call.v[one], **options)
        chunk, chunk_lse = fa4.flash_attn_func(
            call.q[one, 40:100], call.k[one, :100], call.v[one, :100], **options
        )
    assert torch.equal(alone[0], out[1]) and torch.equal(alone_lse[0], lse[1])
    assert torch.equal(chunk[0], out[1, 40:100]) and torch.equal(chunk_lse[0], lse[1, :, 40:100])


@pytest.mark.parametrize("arch", ARCHS)
def test_strides_beyond_32_bits(fa4, arch):
    """FA#2662, FA#2214: sequences more than 2^31 elements apart, in memory that nothing touches."""
    case = Case(name="far", d=64, heads=2, heads_kv=1, seqlens_q=(3,) * 2, seqlens_k=(70,) * 2)
    call = harness.build(case, torch.device("cpu"))
    apart = 2**31 + 2**20
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        store = torch.empty(apart + x[0].numel(), dtype=x.dtype)
        setattr(call, name, store.as_strided(x.shape, (apart, *x.stride()[1:])).copy_(x))
    with card(fa4, arch):
        answer = harness.run(fa4, call)
    harness.judge(call, answer)
