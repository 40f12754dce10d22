"""vLLM's pages of keys and values, as the kernel takes them."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
Pair = tuple[Tensor, Tensor]  # for keys and values


def split_cache(kv_cache: Tensor, head_size: int, as_fp8: bool = False) -> Pair:
    """Views (blocks, block_size, kv_heads, head_size) of keys and of values in one tensor.

    kv_cache is (blocks, kv_heads, block_size, 2 * head_size), in any memory layout. vLLM keeps fp8
    numbers as bytes; `as_fp8` gives them their own dtype.
    """
    if as_fp8:
        kv_cache = kv_cache.view(FP8)
    # split() takes 4 us at every layer, this less than half.
    keys, values = kv_cache.transpose(1, 2).split_with_sizes((head_size, head_size), dim=-1)
    return keys, values


def write_cache(new: Pair, caches: Pair, slots: Tensor, cache_dtype: str, scales: Pair) -> None:
    """Write new keys and values (tokens, kv_heads, head_size) to their slots.

    Args:
        new: of as many tokens as `slots`, or more, where the batch is padded.
        caches: what split_cache gives, of bytes where the cache is fp8.
        slots: (tokens,), block * block_size + offset; negative: the token is left out.
        cache_dtype: vLLM's name for it.
        scales: float32, one number each, by which fp8 caches are multiplied when read.
    """
    if caches[0].device.type == "cuda":
        from vllm._custom_ops import reshape_and_cache_flash

        reshape_and_cache_flash(*new, *caches, slots, cache_dtype, *scales)
        return
    block_size = caches[0].shape[1]
    kept = (slots >= 0).nonzero()[:, 0]
    place = slots[kept] // block_size, slots[kept] % block_size
    for tokens, cache, scale in zip(new, caches, scales, strict=True):
        rows = tokens[kept]
        if cache_dtype.startswith("fp8"):
            largest = torch.finfo(FP8).max
            rows = (rows.float() / scale).clamp(-largest, largest).to(FP8).view(cache.dtype)
        cache[place] = rows
