"""Which decode kernel answers a problem, and with how many splits."""

import math
from typing import Any

from .decode_tiles import DecodeConfig, decode_rows
from .device import Card
from .kernel_keys import DecodeKey
from .problem import AttentionProblem, Layout
from .rules import ScoreRule
from .splits import MAX_SPLITS, choose_splits, fits

LONGEST_BOX = 64  # rows of a page that one TMA brings: all pages of 64 n keys share a kernel
# On mma.sync: a head of the forward kernel takes one tile of 256 rows at least, however few tokens
# fill it. So many row tiles of this kernel cost less: 0.41 of it each, at d 128 on an H200.
ROW_TILES_A_HEAD = 2
# On tcgen05, whose forward kernel packs heads too: so many packed rows.
MAX_PACKED_ROWS = 128


def decodes(p: AttentionProblem, prefill_is_general: bool = False) -> bool:
    """Whether the decode kernel answers `p`: few rows, or what no other kernel does.

    pack_gqa=False with num_splits=1 asks for results that do not depend on the number of queries:
    there the forward kernel answers. `prefill_is_general`: it packs heads too, so that this one is
    left with few rows.
    """
    if p.dropout_p or p.block_size is not None:
        return False
    if not prefill_is_general:
        either = p.num_splits > 1 or (p.num_splits == 0 and p.kv_layout is Layout.PAGED)
        few = p.seqlen_q <= ROW_TILES_A_HEAD * configurations(p, None)[-1].rows
        return bool(p.pack_gqa) or (few and (p.pack_gqa is None or either))
    if p.pack_gqa is False or p.num_heads // p.num_heads_kv > MAX_PACKED_ROWS:
        return bool(p.pack_gqa)
    return packed_rows(p) <= MAX_PACKED_ROWS


def packed_rows(p: AttentionProblem) -> int:
    """Query rows that share a key head in the longest sequence."""
    return p.seqlen_q * (p.num_heads // p.num_heads_kv)


def decode_plan(p: AttentionProblem, rule: Any, card: Card) -> tuple[DecodeKey, int]:
    """The decode kernel for `p`, and the number of splits."""
    assert card.variant is not None, "the card is supported"
    cfg, num_splits = choose_config(p, card)
    key = DecodeKey(
        variant=card.variant,
        dtype=p.dtype,
        cfg=cfg,
        head_dim=p.head_dim,
        head_dim_v=p.head_dim_v,
        rule=rule,
        q_layout=p.q_layout,
        kv_layout=p.kv_layout,
        box_n=None if p.page_size is None else math.gcd(p.page_size, LONGEST_BOX),
        is_split=num_splits > 1,
        has_seqused_q=p.has_seqused_q,
        has_seqused_k=p.has_seqused_k,
        has_kv_batch_idx=p.has_kv_batch_idx,
        has_lse=p.return_lse,
        has_leftpad=p.has_cache_leftpad,
        has_k_descale=p.has_k_descale,
        has_v_descale=p.has_v_descale,
        score=ScoreRule.of(p),
    )
    return key, num_splits


def configurations(p: AttentionProblem, variant: str | None) -> tuple[DecodeConfig, ...]:
    """The narrowest rows of the table that hold the head dimensions."""
    odd_box = p.page_size is not None and p.page_size % 2 == 1
    return next(
        configs
        for width, configs in decode_rows(1 if p.fp8_kv else 2, variant).items()
        # Rows of 64 bytes begin at a multiple of 128 only every second time: see common.kv.
        if width >= max(p.head_dim, p.head_dim_v)
        and not (odd_box and configs[0].swizzle_elements < 64)
    )


def choose_config(p: AttentionProblem, card: Card) -> tuple[DecodeConfig, int]:
    """That with the fewest row tiles, and the number of splits; among such, the fastest."""
    configs = configurations(p, card.variant)
    rows = next((cfg.rows for cfg in configs if cfg.rows >= packed_rows(p)), configs[-1].rows)
    by_pace = {cfg.pace: cfg for cfg in configs if cfg.rows == rows}
    tiles = p.batch * p.num_heads_kv * -(-packed_rows(p) // rows)
    num_splits = min(p.num_splits, MAX_SPLITS)
    if num_splits:
        pace = next(x for x in by_pace if fits(x, num_splits, tiles, card.num_sms))
    else:
        blocks = -(-p.seqlen_k // next(iter(by_pace.values())).block_n)
        even = p.kv_layout is Layout.DENSE and not p.has_seqused_k
        pace, num_splits = choose_splits(tiles, blocks, card.num_sms, even, tuple(by_pace))
    return by_pace[pace], num_splits


def explain_decode(key: DecodeKey) -> str:
    """The kernel and its tiles, for people."""
    cfg = key.cfg
    pages = f" in boxes of {key.box_n}" if key.box_n else ""
    return (
        f"kernel: mma.sync decode for {key.variant}, {key.dtype}, head_dim {key.head_dim}, "
        f"queries {key.q_layout.value}, keys {key.kv_layout.value}{pages}\n"
        f"tiles: {cfg.rows} packed rows x {cfg.block_n} keys, {cfg.kv_stages} K/V slots, "
        f"{cfg.num_compute_warps} compute warps, {cfg.smem_bytes} bytes of shared memory\n"
        f"scores: {', '.join(key.score.names()) or 'scaled dot products'}"
    )
