"""The dropout mask as the cpu variant documents it, written a second time for the oracle.

Element (i, j) of query head h of sequence b takes word j mod 4 of Philox4x32-10 with the counter
(j div 4, i, b * heads + h, offset) and the key (seed mod 2^32, seed div 2^32), and is kept where
that word is at least floor(p * 2^32).
"""

import torch
from torch import Tensor

ONES = 0xFFFFFFFF


def product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of a * b, all words in int64 tensors."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    low = low_half + ((high_half & 0xFFFF) << 16)
    return (high_half >> 16) + (low >> 32), low & ONES


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of the paper on tensors of 32-bit words."""
    for _ in range(10):
        high0, low0 = product(counter[0], 0xD2511F53)
        high1, low1 = product(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = ((key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES)
    return counter


def multipliers(p: float, state: tuple[int, int], stream: int, rows: Tensor, sk: int) -> Tensor:
    """(len(rows), sk) float64: 0 where dropped, else 1 / (1 - p). stream is b * heads + h."""
    seed, offset = state
    keys = torch.arange(sk, device=rows.device)
    i, j = torch.broadcast_tensors(rows[:, None], keys[None, :])
    counter = [j // 4, i, torch.full_like(i, stream), torch.full_like(i, offset & ONES)]
    words = torch.stack(philox(counter, (seed & ONES, seed >> 32 & ONES)))
    word = words.gather(0, (j % 4)[None])[0]
    return (word >= int(p * 2**32)).double() / (1 - p)
