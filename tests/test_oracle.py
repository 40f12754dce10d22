"""The oracle against PyTorch's attention in float64, and against numbers checked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from . import oracle
from .oracle import Rule


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("sq, sk", [(7, 7), (3, 9), (9, 3), (1, 12)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_sdpa_in_float64(heads, heads_kv, sq, sk, causal):
    q, k, v = tokens(0, sq, heads, 16), tokens(1, sk, heads_kv, 16), tokens(2, sk, heads_kv, 8)
    result = oracle.attend(q, k, v, Rule(causal=causal))
    keep = (
        torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
        if causal
        else torch.ones(sq, sk, dtype=torch.bool)
    )
    k, v = (x.repeat_interleave(heads // heads_kv, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=keep
    ).transpose(0, 1)
    seen = keep.any(1)
    torch.testing.assert_close(result.out[seen], expected[seen], rtol=1e-12, atol=1e-12)
    assert torch.equal(result.out[~seen], torch.zeros_like(result.out[~seen]))
    assert torch.equal(result.lse.isinf(), ~seen.expand(heads, sq))


def test_mask_is_aligned_bottom_right():
    """FA2 >= 2.1: a later query sees more; sq 5 over sk 2 leaves three rows empty."""
    rule = Rule(causal=True)
    assert oracle.visible_keys(rule, torch.arange(2), 2, 5, (0, 0)).int().tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    expected = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert oracle.visible_keys(rule, torch.arange(5), 5, 2, (0, 0)).int().tolist() == expected


def test_window_counts_both_ends():
    rule = Rule(window=(1, 0))
    assert oracle.visible_keys(rule, torch.arange(3), 3, 4, (0, 0)).int().tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("window", [None, (None, None), (-1, -1), (None, -1), (-1, None)])
def test_every_spelling_of_no_window(window):
    assert oracle.visible_keys(Rule(window=window), torch.arange(4), 4, 6, (0, 0)).all()


@pytest.mark.parametrize("sink", [0.5, -math.inf])
def test_a_row_without_keys_has_the_sink_alone(sink):
    """The softmax over {sink}, which has no value; exp(-inf) = 0 is no sink."""
    q, k, v = tokens(0, 3, 1, 4), tokens(1, 1, 1, 4), tokens(2, 1, 1, 4)
    result = oracle.attend(q, k, v, Rule(causal=True, sink=torch.tensor([sink])))
    assert result.lse[0, :2].tolist() == [sink, sink]
    assert (result.out[:2] == 0).all()


def test_one_key_by_hand():
    q, k, v = torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]]), torch.tensor([[[5.0]]])
    sink, slope = torch.tensor([1.0]), torch.tensor([0.5])
    rule = Rule(softmax_scale=0.5, softcap=2.0, sink=sink, alibi_slopes=slope)
    s = 2.0 * math.tanh(0.5 * 6.0 / 2.0)
    lse = math.log(math.exp(s) + math.exp(1.0))
    result = oracle.attend(q, k, v, rule)
    assert float(result.lse) == pytest.approx(lse, abs=1e-12)
    assert float(result.out) == pytest.approx(5.0 * math.exp(s - lse), abs=1e-12)


def test_alibi_is_the_distance_from_the_diagonal():
    q, k, v = torch.zeros(2, 1, 4), torch.zeros(3, 1, 4), tokens(0, 3, 1, 4)
    result = oracle.attend(q, k, v, Rule(alibi_slopes=torch.tensor([[0.25]])))
    expected = (
        torch.softmax(
            -0.25 * torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64), 1
        )
        @ v[:, 0]
    )
    torch.testing.assert_close(result.out[:, 0], expected)


def test_mods_see_batch_head_and_positions():
    q, k, v = tokens(0, 3, 2, 4), tokens(1, 5, 2, 4), tokens(2, 5, 2, 4)
    table = tokens(3, 2, 3, 5)
    rule = Rule(
        score_mod=lambda x, b, h, i, j, info, aux: x + aux[0][h, i, j] * b, aux_tensors=[table]
    )
    bias = oracle.attend(q, k, v, rule, batch=1).out
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=table
    ).transpose(0, 1)
    torch.testing.assert_close(bias, expected, rtol=1e-12, atol=1e-12)
    causal = Rule(mask_mod=lambda b, h, i, j, info, aux: j <= i + info.seqlen_k - info.seqlen_q)
    assert torch.equal(
        oracle.attend(q, k, v, causal).out, oracle.attend(q, k, v, Rule(causal=True)).out
    )


def test_layouts_cut_out_the_same_sequences():
    x = tokens(0, 2, 6, 1, 4)
    dense = oracle.from_dense(x, used=torch.tensor([4, -1]))
    assert [s.shape[0] for s in dense] == [4, 0]
    assert torch.equal(oracle.from_dense(x, batch_idx=torch.tensor([1]))[0], x[1])
    packed = oracle.from_packed(
        x.flatten(0, 1), torch.tensor([0, 6, 6, 12]), used=torch.tensor([2, 0, 3])
    )
    assert [s.shape[0] for s in packed] == [2, 0, 3]
    assert torch.equal(packed[2], x[1, :3])
    pages = x.reshape(6, 2, 1, 4)
    paged = oracle.from_paged(
        pages, torch.tensor([[0, 1, -1], [4, 99, -7]], dtype=torch.int32), used=torch.tensor([3, 2])
    )
    assert torch.equal(paged[0], x[0, :3])
    assert torch.equal(paged[1], pages[4])


def test_append_writes_after_what_is_used():
    cache, new = torch.zeros(2, 4, 1, 1), [torch.ones(2, 1, 1), torch.full((2, 1, 1), 2.0)]
    assert oracle.append(cache, new, [1, -1])[:, :, 0, 0].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    table = torch.tensor([[1, 0], [-1, -1]])
    paged = oracle.append(torch.zeros(2, 2, 1, 1), new, [1, -1], page_table=table)
    assert paged[:, :, 0, 0].tolist() == [[1, 0], [0, 1]]
    assert oracle.append(cache, new, [0, 2], batch_idx=torch.tensor([1, 0]))[
        :, :, 0, 0
    ].tolist() == [[0, 0, 2, 2], [1, 1, 0, 0]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_is_multiplication_by_a_complex_number(interleaved):
    x, angle = tokens(0, 3, 2, 10), tokens(1, 8, 4)
    turned = oracle.rotate(x, angle.cos(), angle.sin(), [5, 6, 2], interleaved)
    part = (
        x[..., :8].unflatten(-1, (4, 2))
        if interleaved
        else x[..., :8].unflatten(-1, (2, 4)).transpose(-1, -2)
    )
    spun = (
        torch.view_as_complex(part.contiguous())
        * torch.polar(torch.ones(3, 4).double(), angle[[5, 6, 2]])[:, None]
    )
    spun = torch.view_as_real(spun)
    expected = spun.flatten(-2) if interleaved else spun.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(turned[..., :8], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(turned[..., 8:], x[..., 8:])


def test_combine_of_parts_is_the_whole():
    q, k, v = tokens(0, 4, 2, 8), tokens(1, 9, 2, 8), tokens(2, 9, 2, 8)
    whole = oracle.attend(q, k, v, Rule())
    parts = [oracle.attend(q, k[a:b], v[a:b], Rule()) for a, b in [(0, 2), (2, 2), (2, 9)]]
    spoiled = torch.full_like(parts[1].out, math.nan)
    out, lse = oracle.combine([parts[0].out, spoiled, parts[2].out], [p.lse.T for p in parts])
    torch.testing.assert_close(out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole.lse.T, rtol=1e-12, atol=1e-12)
    out, lse = oracle.combine([spoiled, spoiled], [parts[1].lse.T] * 2)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_gradients_are_those_of_finite_differences():
    q, k, v = (tokens(n, 3, 2, 2).requires_grad_() for n in range(3))
    sink = tokens(3, 2).requires_grad_()

    def run(q, k, v, sink):
        result = oracle.attend(q, k, v, Rule(causal=True, softcap=1.5, sink=sink))
        return result.out, result.lse

    assert torch.autograd.gradcheck(run, (q, k, v, sink))
