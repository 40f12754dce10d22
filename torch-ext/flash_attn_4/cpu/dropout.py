"""The dropout mask: Philox4x32-10, so every implementation can draw any element on its own.

Counter layout, which GPU kernels follow. For query i and key j, both counted within the sequence,
of query head h in sequence b:

    key      = (seed mod 2^32, seed div 2^32)
    counter  = (j div 4, i, b * num_heads + h, offset mod 2^32)
    word     = philox4x32_10(counter, key)[j mod 4]
    kept     <=>  word >= floor(p * 2^32)

so one evaluation serves four neighbouring keys of one query, and the mask depends neither on tiles
nor on threads. Kept probabilities are scaled by 1 / (1 - p); the log-sum-exp ignores dropout.
Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import Tile

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Dropout:
    """Drops each probability with chance `p`, as decided by `seed` and `offset`."""

    p: float
    seed: int
    offset: int
    num_heads: int

    def multiplier(self, tile: Tile) -> Tensor:
        """float32 (count, h, rows, cols): 1 / (1 - p) where kept, else 0."""
        group, cols = tile.group, tile.cols
        first, last = cols.start // 4, -(-cols.stop // 4)
        heads = torch.arange(
            group.first * self.num_heads, (group.first + group.count) * self.num_heads, device="cpu"
        )
        counter = (
            torch.arange(first, last, device="cpu").view(1, 1, 1, -1),
            torch.arange(tile.rows.start, tile.rows.stop, device="cpu").view(1, 1, -1, 1),
            heads.view(group.count, self.num_heads, 1, 1),
            torch.tensor(self.offset & _LOW, device="cpu").view(1, 1, 1, 1),
        )
        words = torch.stack(philox(counter, (self.seed & _LOW, self.seed >> 32 & _LOW)), dim=-1)
        words = words.flatten(-2)[..., cols.start - 4 * first : cols.stop - 4 * first]
        kept = words >= int(self.p * 2.0**32)
        return kept.to(torch.float32).mul_(1.0 / (1.0 - self.p))


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on broadcastable int64 tensors that hold 32-bit words; four words each."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which leaves the 64 bits of the unsigned product unchanged.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> 32 & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def make_dropout(p: float, state: Tensor | None, num_heads: int) -> Dropout | None:
    """The dropout of one call from its (seed, offset) tensor, or None without dropout."""
    if p == 0.0:
        return None
    assert state is not None, "the interface draws a state whenever dropout_p > 0"
    seed, offset = state.tolist()
    return Dropout(p, seed, offset, num_heads)
