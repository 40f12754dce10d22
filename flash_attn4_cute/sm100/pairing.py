"""Where a row of the table is taken in pairs of CTAs, if both do. Host code."""

from ..mask_rule import Band, band_of
from ..problem import AttentionProblem, Layout
from .tiles import PAIR_ROWS, TileConfig

WHOLE_BLOCKS = 128  # rows of a page: smaller ones are not worth their boxes twice
MANY_TILES = 16
# Keys that a query must see, on average, for a pair to pay under a right bound, by head_dim: of its
# 512 rows, a diagonal cuts off fewer blocks. Modelled, not measured: docs/timing.md.
SEEN_KEYS = {128: 2048, 192: 1024}


def in_pairs(row: TileConfig, variant: str, p: AttentionProblem) -> TileConfig:
    """The row of these widths that works in pairs, if there is one and it pays; else `row`."""
    dims = (row.head_dim, row.head_dim_v)
    rows = PAIR_ROWS[variant] if pays_in_pairs(row, p) else ()
    return next((pair for pair in rows if (pair.head_dim, pair.head_dim_v) == dims), row)


def pays_in_pairs(row: TileConfig, p: AttentionProblem) -> bool:
    """Whether pairs of CTAs are likely to be faster than CTAs alone.

    A pair waits for the slower of its CTAs and has twice the rows: it pays where all sequences are
    equally long and it leaves no more rows idle, or so few of many that it does not matter, and
    where no window is narrow beside its rows. As upstream does without a mask; not measured.
    """
    even = p.q_layout is Layout.DENSE and not (p.has_seqused_q or p.has_seqused_k)
    even = even and p.block_size is None
    band = band_of(p.mask)
    if isinstance(band, Band):
        even = even and band.left is None and sees_enough(row.head_dim, p.seqlen_q, p.seqlen_k)
    whole = p.page_size is None or p.page_size % WHOLE_BLOCKS == 0
    if not even or not whole or p.num_splits > 1:
        return False
    alone, pairs = -(-p.seqlen_q // row.block_m), -(-p.seqlen_q // (2 * row.block_m))
    return 2 * pairs == alone or alone >= MANY_TILES


def sees_enough(head_dim: int, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether a pair pays under a right bound."""
    return head_dim in SEEN_KEYS and seqlen_k - seqlen_q // 2 >= SEEN_KEYS[head_dim]
