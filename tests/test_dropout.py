"""The dropout mask is the one that cpu/dropout.py documents, whatever the tiles and layouts."""

from __future__ import annotations

import pytest
import torch

HEADS, KV_HEADS, DIM = 4, 2, 16
ONES = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 of the paper, on Python integers."""
    for _ in range(10):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = (
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & ONES,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & ONES,
        )
        key = ((key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES)
    return counter


def multipliers(p, state, batch, sq, sk):
    """(b, h, sq, sk): 0 where dropped, 1 / (1 - p) where kept, element by element."""
    seed, offset = state
    key = (seed & ONES, seed >> 32 & ONES)
    kept = torch.zeros(batch, HEADS, sq, sk)
    for b in range(batch):
        for h in range(HEADS):
            for i in range(sq):
                for j in range(0, sk, 4):
                    words = philox((j // 4, i, b * HEADS + h, offset & ONES), key)
                    for r in range(min(4, sk - j)):
                        kept[b, h, i, j + r] = words[r] >= int(p * 2**32)
    return kept / (1 - p)


def attention(q, k, v, multiplier):
    """Causal attention with dropout, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    s = q @ k.transpose(-1, -2) * DIM**-0.5
    sq, sk = s.shape[-2:]
    hidden = torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)
    p = torch.softmax(s.masked_fill(hidden, -torch.inf), -1)
    return (p * multiplier @ v).transpose(1, 2)


def test_the_reference_philox():
    """Known answers of the Random123 distribution."""
    assert philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ONES,) * 4, (ONES,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def drawn_state(seed, device="cpu"):
    """What a call after torch.manual_seed(seed) draws."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (2,), device=device).tolist()


def test_which_elements_are_kept(fa4, device):
    """Equal weights and V = 1 leave the mask itself, on every device the documented one."""
    batch, sq, sk, p = 2, 9, 24, 0.3
    q = torch.zeros(batch, sq, HEADS, DIM, device=device, dtype=torch.bfloat16)
    k = torch.zeros(batch, sk, KV_HEADS, DIM, device=device, dtype=torch.bfloat16)
    v = torch.eye(sk, device=device, dtype=torch.bfloat16)[None, :, None]
    v = v.expand(batch, sk, KV_HEADS, sk).contiguous()
    kept = multipliers(p, drawn_state(5, device), batch, sq, sk).transpose(1, 2)
    torch.manual_seed(5)
    out = fa4.flash_attn_func(q, k, v, dropout_p=p)
    torch.testing.assert_close(out.float().cpu() * sk, kept, rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_output_and_gradients(fa4, num_splits):
    """Forward and backward use the documented mask."""
    torch.manual_seed(0)
    batch, sq, sk, p = 2, 9, 22, 0.3
    q = torch.randn(batch, sq, HEADS, DIM)
    k, v = (torch.randn(batch, sk, KV_HEADS, DIM) for _ in range(2))
    dout = torch.randn_like(q)
    multiplier = multipliers(p, drawn_state(5), batch, sq, sk)
    expected_inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = attention(*expected_inputs, multiplier)
    expected.backward(dout.double())
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.manual_seed(5)
    out = fa4.flash_attn_func(*inputs, causal=True, dropout_p=p, num_splits=num_splits)
    out.backward(dout)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_packed_sequences_use_the_mask_of_dense_ones(fa4):
    """Indices count within the sequence, so packing does not change what is dropped."""
    torch.manual_seed(0)
    q = torch.randn(2, 12, HEADS, DIM)
    k, v = (torch.randn(2, 12, KV_HEADS, DIM) for _ in range(2))
    cu = torch.tensor([0, 12, 24], dtype=torch.int32)
    torch.manual_seed(1)
    dense = fa4.flash_attn_func(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    packed = fa4.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), cu, cu, 12, 12, dropout_p=0.5
    )
    torch.testing.assert_close(packed, dense.flatten(0, 1), rtol=1e-6, atol=1e-6)


def test_share_of_what_is_dropped(fa4):
    """Over a large tile the share is p, and the log-sum-exp does not know of dropout."""
    torch.manual_seed(0)
    q = torch.zeros(1, 256, HEADS, 1)
    k = torch.zeros(1, 1024, HEADS, 1)
    v = torch.ones(1, 1024, HEADS, 1)
    out, lse = fa4.flash_attn_func(q, k, v, dropout_p=0.25, return_lse=True)
    again = fa4.flash_attn_func(q, k, v, dropout_p=0.25)
    share_kept = out.mean() * 0.75  # v is 1, so a row's output is its share of keys / (1 - p)
    assert abs(share_kept - 0.75) < 4 * (0.25 * 0.75 / out.numel() / 1024) ** 0.5
    torch.testing.assert_close(lse, torch.full_like(lse, 1024).log())
    assert not torch.equal(out, again)
