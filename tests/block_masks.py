"""Block-sparse masks for tests: the lists of a table of block kinds, and the mask they mean."""

from types import SimpleNamespace

import torch
from torch import Tensor


def lists(kinds: Tensor, block_size: tuple[int, int]) -> SimpleNamespace:
    """What a caller passes for `kinds` (b, h, M, N): 0 skipped, 1 partial, 2 full.

    Entries behind each list's end are what nobody may follow.
    """
    fields = {}
    for name, kind in (("mask", 1), ("full", 2)):
        found = kinds == kind
        order = torch.argsort((~found).to(torch.uint8), dim=3, stable=True).to(torch.int32)
        count = found.sum(3, dtype=torch.int32)
        behind = torch.arange(kinds.shape[3], device=kinds.device) >= count[..., None]
        fields[f"{name}_block_cnt"] = count
        fields[f"{name}_block_idx"] = order.masked_fill(behind, 2**30)
    return SimpleNamespace(**fields, block_size=block_size)


def as_mask_mod(kinds: Tensor, block_size: tuple[int, int], mask_mod=None):
    """The same mask as a mask_mod for the oracle."""
    rows, keys = block_size

    def admit(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        where = (b % kinds.shape[0], h % kinds.shape[1], q_idx // rows, kv_idx // keys)
        kind = kinds[where]
        inside = kind == 1
        if mask_mod is not None:
            inside = inside & mask_mod(b, h, q_idx, kv_idx, seqlen_info, aux_tensors)
        return (kind == 2) | inside

    return admit
