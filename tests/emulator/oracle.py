"""Attention in float64, and FACTS' acceptance rule: twice PyTorch's own error and rounding."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of q (b, sq, h, d), k, v (b, sk, h_k, d | d_v), in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), lse


def check(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raise AssertionError with the numbers unless out and lse are right."""
    exact, exact_lse = attention(q.double(), k.double(), v.double(), causal)
    rounded, _ = attention(q, k, v, causal)
    error = (out.double() - exact).abs().max().item()
    single = exact.float()
    limit = 2 * (rounded.double() - exact).abs().max().item()
    limit += 2 * (single + 0.3 - 0.3 - single).abs().max().item()
    assert error <= limit, f"out is off by {error:.3g}, allowed {limit:.3g}"
    finite = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite), "lse is finite where it should not be, or not"
    lse_error = (lse.double() - exact_lse)[finite].abs().max().item()
    assert lse_error <= 1e-4, f"lse is off by {lse_error:.3g}"
