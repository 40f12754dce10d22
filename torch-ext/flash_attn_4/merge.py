"""Exact merging of attention results over disjoint sets of keys, in plain PyTorch operations.

With partial results o_i = softmax(s_i) v_i and l_i = log sum_j exp(s_ij), that over all keys is

    l = log sum_i exp(l_i),        o = sum_i exp(l_i - l) o_i

(Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021, section 2). This is what
split-KV decoding, cascade attention, and ring or context parallelism do with their parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Merge along dimension 0, in float32.

    Args:
        out_partial: (parts, ..., heads, seqlen, d).
        lse_partial: (parts, ..., heads, seqlen). -inf marks a part without keys for the row, and so
            does +inf, which FlashAttention-2 writes; such a part is not read.

    Returns:
        out: float32 (..., heads, seqlen, d), 0 where no part has keys.
        lse: float32 (..., heads, seqlen), -inf there.
    """
    lse = lse_partial.float()
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    largest = lse.amax(dim=0).detach()
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weight = torch.exp(lse - largest)
    total = weight.sum(dim=0)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    weight = (weight / total).unsqueeze(-1)
    out = (out_partial.float().masked_fill(weight == 0.0, 0.0) * weight).sum(dim=0)
    return out, torch.where(empty, -torch.inf, largest + torch.log(total))


def combine_parts(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """`combine` for results as the public functions return them: (parts, ..., seqlen, heads, d)."""
    out, lse = combine(out_partial.transpose(-2, -3), lse_partial)
    return out.transpose(-2, -3), lse
