"""New keys and values into the cache, with rotary embedding of keys and queries.

A token at position t has its first rotary_dim dimensions rotated in pairs (x, y):

    x' = x cos_t - y sin_t,    y' = x sin_t + y cos_t

where the pairs are (0, 1), (2, 3), ... if interleaved (GPT-J), else (0, r/2), (1, r/2 + 1), ...
(GPT-NeoX, Llama). Reference: Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash_attn4_cute.cache_update import CacheUpdate, lengths_after, new_token_counts
from ..flash_attn4_cute.checks import FP8
from ..flash_attn4_cute.problem import AttentionTensors


def append_kv(update: CacheUpdate, tensors: AttentionTensors, rotate_along: bool) -> None:
    """Write the new tokens into tensors.k and tensors.v, then make `tensors` ask about the result.

    Sets tensors.seqused_k to the lengths after the update and, with rotary tables, tensors.q to the
    rotated queries: at cache_seqlens + i if `rotate_along` (causal or windowed attention), else all
    at cache_seqlens.
    """
    sequence, position = _token_positions(update)
    keys, values = update.k.flatten(0, -3), update.v.flatten(0, -3)
    real = position >= 0
    sequence, position = sequence[real], position[real]
    keys, values = keys[: real.shape[0]][real], values[: real.shape[0]][real]
    if tensors.k.dtype == FP8:
        keys, values = keys.to(torch.float32), values.to(torch.float32)
    if update.rotary_cos is not None:
        keys = rotate(keys, position, update)
        tensors.q = _rotate_queries(tensors, update, rotate_along)
    if tensors.k.dtype == FP8:
        keys = quantise(keys, tensors.k_descale, sequence)
        values = quantise(values, tensors.v_descale, sequence)
    where = _cache_slots(tensors, sequence, position)
    bits = torch.uint8 if tensors.k.dtype == FP8 else tensors.k.dtype  # no index_put_ for fp8
    tensors.k.view(bits)[where] = keys.view(bits)
    tensors.v.view(bits)[where] = values.view(bits)
    tensors.seqused_k = lengths_after(update)


def quantise(x: Tensor, descale: Tensor | None, sequence: Tensor) -> Tensor:
    """`x` (tokens, heads, d), float32, divided by its sequence's descale (b, heads), as fp8."""
    if descale is not None:
        x = x * descale.reciprocal()[sequence].unsqueeze(-1)
    largest = torch.finfo(FP8).max
    return x.clamp(-largest, largest).to(FP8)


def rotate(x: Tensor, position: Tensor, update: CacheUpdate) -> Tensor:
    """`x` (tokens, heads, d) rotated to `position` (tokens,), in float32, rounded to x's dtype."""
    assert update.rotary_cos is not None and update.rotary_sin is not None
    cos = update.rotary_cos[position].to(torch.float32).unsqueeze(-2)
    sin = update.rotary_sin[position].to(torch.float32).unsqueeze(-2)
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].to(torch.float32), x[..., 2 * half :]
    pairs = rotated.unflatten(-1, (half, 2) if update.rotary_interleaved else (2, half))
    pair_dim = -1 if update.rotary_interleaved else -2
    a, b = pairs.unbind(pair_dim)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=pair_dim)
    return torch.cat((turned.flatten(-2).to(x.dtype), rest), dim=-1)


def _token_positions(update: CacheUpdate) -> tuple[Tensor, Tensor]:
    """(sequence, position in the cache) of every new token; negative positions are padding."""
    counts = new_token_counts(update).long()
    starts = update.cache_seqlens.long()
    sequence = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    index = torch.arange(len(sequence), device="cpu") - (counts.cumsum(0) - counts)[sequence]
    start = starts[sequence]
    return sequence, torch.where(start < 0, -1, start + index)


def _cache_slots(
    tensors: AttentionTensors, sequence: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Index of the cache's first two dimensions for each token."""
    if tensors.page_table is not None:
        size = tensors.k.shape[1]
        return tensors.page_table[sequence, position // size].long(), position % size
    if tensors.kv_batch_idx is not None:
        sequence = tensors.kv_batch_idx[sequence].long()
    return sequence, position


def _rotate_queries(tensors: AttentionTensors, update: CacheUpdate, along: bool) -> Tensor:
    q, starts = tensors.q, update.cache_seqlens.long().clamp(min=0)
    if tensors.cu_seqlens_q is None:
        step = torch.arange(q.shape[1], device="cpu") * int(along)
        position = (starts[:, None] + step).flatten()
        return rotate(q.flatten(0, 1), position, update).unflatten(0, q.shape[:2])
    first = tensors.cu_seqlens_q.long()
    counts = first.diff()
    sequence = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    position = starts[sequence]
    if along:
        position = position + torch.arange(len(sequence), device="cpu") - first[sequence]
    rotated = rotate(q[: len(sequence)], position, update)
    return torch.cat((rotated, q[len(sequence) :]))
