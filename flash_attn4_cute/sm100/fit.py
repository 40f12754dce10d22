"""What the plan adds to a row of the table for one problem: packing, pages, splits. Host code.

All of it follows from shapes and maxima, so that a captured graph may replay at other lengths.
"""

import math
from dataclasses import replace

from ..mask_rule import Band, band_of
from ..problem import AttentionProblem, Layout
from ..splits import MAX_SPLITS
from .tiles import BLOCK_M, BLOCK_N, MIN_BOX_ROWS, TileConfig

MAX_IDLE_ROWS = 16  # of 128, that packing may waste where it saves no tile for certain
# Modelled, not measured: in units of the time that a CTA takes for one key block.
CTA_COST = 3.0  # start and end of a CTA
MERGE_COST = 3.0  # a further launch
PART_COST = 5.0  # 256 rows of float32 to write and to read again, at an SM's share of bandwidth
LEAST_GAIN = 0.8  # split keys must promise at least a fifth of the time


def fitted(row: TileConfig, p: AttentionProblem) -> TileConfig:
    """The row as the kernel for this problem is compiled."""
    box_n = None if p.page_size is None else math.gcd(p.page_size, row.k_rows)
    if box_n is not None and box_n < MIN_BOX_ROWS:
        box_n = 1  # one kernel gathers them all
    return replace(row, group=packed_group(row, p)).in_boxes(box_n)


def can_pack(p: AttentionProblem) -> bool:
    """Whether the query heads of a key head can share tiles."""
    return 1 <= p.num_heads // p.num_heads_kv <= BLOCK_M and p.block_size is None


def packed_group(row: TileConfig, p: AttentionProblem) -> int:
    """The query heads that share tiles; 1 if packing does not pay or is not wanted.

    It pays if fewer tiles hold all queries; where sequences may be shorter than the longest, and
    under a right bound, whose diagonal then cuts fewer scores off a tile, also if as many do.
    """
    group = p.num_heads // p.num_heads_kv
    if group == 1 or not can_pack(p) or p.pack_gqa is False:
        return 1
    packed = -(-p.seqlen_q // replace(row, group=group).block_tokens)
    apart = group * -(-p.seqlen_q // row.block_tokens)
    idle = BLOCK_M - BLOCK_M // group * group
    band = band_of(p.mask)
    uneven = p.q_layout is not Layout.DENSE or p.has_seqused_q
    cut = isinstance(band, Band) and band.right is not None
    pays = packed < apart or (idle <= MAX_IDLE_ROWS and (uneven or (cut and packed <= apart)))
    return group if p.pack_gqa or pays else 1


def choose_splits(cfg: TileConfig, p: AttentionProblem, num_sms: int) -> int:
    """The number of splits that the problem asks for, or the one with the least modelled time."""
    if p.num_splits > 0:
        return min(p.num_splits, MAX_SPLITS)
    if p.block_size is not None:
        return 1
    tiles = p.batch * (p.num_heads // cfg.group) * -(-p.seqlen_q // cfg.block_tokens)
    num_sms //= cfg.ctas
    blocks = -(-p.seqlen_k // BLOCK_N)
    if tiles <= 0 or 2 * tiles > num_sms or blocks <= 1:
        return 1

    def cost(splits: int) -> float:
        streaming = -(-tiles * splits // num_sms) * (-(-blocks // splits) + CTA_COST)
        if splits == 1:
            return streaming
        return streaming + MERGE_COST + PART_COST * tiles * splits / num_sms

    best = min(range(1, min(blocks, MAX_SPLITS) + 1), key=cost)
    return best if cost(best) <= LEAST_GAIN * cost(1) else 1
