"""Partial results to merge, as the fuzzer draws them, and whether they were merged rightly."""

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..acceptance import ARITHMETIC
from ..append_cases import same_bits
from ..cases import BF16


@dataclass(frozen=True, kw_only=True)
class Merge:
    """`parts` results of `length` rows; `pair` merges two states instead of a stack.

    `empty` is the share of rows in which a part has no keys and holds NaN.
    """

    parts: int = 2
    batch: int | None = 1  # None: packed
    length: int = 3
    heads: int = 1
    d: int = 64
    dtype: torch.dtype = BF16
    out_dtype: torch.dtype | None = None
    pair: bool = False
    aligned: bool = True
    empty: float = 0.0
    seed: int = 0


def build(value: Merge, device: torch.device) -> tuple[Tensor, Tensor]:
    """(parts, [b,] s, h, d) and their LSEs, far apart."""
    gen = torch.Generator().manual_seed(value.seed)
    outer = () if value.batch is None else (value.batch,)
    out = torch.randn(value.parts, *outer, value.length, value.heads, value.d, generator=gen)
    lse = torch.randn(value.parts, *outer, value.heads, value.length, generator=gen) * 15
    nothing = torch.rand(lse.shape, generator=gen) < value.empty
    lse[nothing] = -math.inf
    lse[nothing & (torch.rand(lse.shape, generator=gen) < 0.5)] = math.inf
    out[nothing.transpose(-1, -2)] = math.nan
    out = out.to(device, value.dtype)
    if not value.aligned:
        out = torch.cat([out.new_zeros(1), out.flatten()])[1:].view(out.shape)
    return out, lse.to(device)


def exact(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The merge in float64, by the formula."""
    lse = lse.double().masked_fill(lse == math.inf, -math.inf).transpose(-1, -2)
    total = lse.logsumexp(0)
    weights = (lse - total.masked_fill(total == -math.inf, 0.0)).exp()[..., None]
    merged = (out.double().masked_fill(weights == 0, 0.0) * weights).sum(0)
    return merged, total.transpose(-1, -2)


def verify(package: ModuleType, value: Merge, device: torch.device) -> None:
    """Call, and compare: within the arithmetic of float32 and one rounding.

    Raises:
        AssertionError: a wrong result, or an input that changed.
    """
    out, lse = build(value, device)
    kept = out.clone(), lse.clone()
    if value.pair:
        got, got_lse = package.merge_attention_states(out[0], lse[0], out[1], lse[1])
    else:
        got, got_lse = package.flash_attn_combine(out, lse.mT, out_dtype=value.out_dtype)
        got_lse = got_lse.mT
    for x, before in zip((out, lse), kept, strict=True):
        same_bits(x, before)
    dtype = value.dtype if value.pair or value.out_dtype is None else value.out_dtype
    assert got.dtype == dtype and got_lse.dtype == torch.float32
    slips = (torch.finfo(dtype).eps if dtype != torch.float32 else 0.0, 0.0)
    for found, truth, slip in zip((got, got_lse), exact(out, lse), slips, strict=True):
        finite = truth.isfinite()
        assert torch.equal(found.double()[~finite], truth[~finite])
        if finite.any():
            bound = (ARITHMETIC + slip) * max(1.0, float(truth[finite].abs().max()))
            assert (found.double() - truth)[finite].abs().max() <= bound
