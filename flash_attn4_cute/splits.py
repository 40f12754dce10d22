"""Into how many parts the keys of a decode launch are split.

A CTA streams one split of one (sequence, key head, row tile). A launch lasts as long as the SM with
the most to do:

    ceil(tiles * splits / SMs)  x  (ceil(blocks / splits) + CTA_COST)

in units of one block at an SM's share of the bandwidth, plus the merge. It depends on shapes and
maxima only, so a captured graph may replay at other lengths: each sequence divides its own blocks
by the number of splits.

Fitted to an H200 as sm_90a, 2026-11-29 (benchmarks/results): h32/8 d128, us by splits
    b1 kv8192     8: 20.9  16: 21.7  32: 23.3  48: 27.0
    b1 kv131072  16: 137   33: 144   64: 152  128: 166
    b8 kv8192     2: 79.0   4: 80.8   8: 83.4
    b64 kv4096    1: 255    2: 264
"""

MAX_SPLITS = 256  # what the combine kernel merges
CTA_COST = 3.0  # start and end of a CTA
MERGE_COST = 3.0  # a combine launch that starts while the decode kernel ends
PART_COST = 0.1  # a further part to write and read
# Where lengths differ, the longest sequence may be alone: no CTA streams more than this of it.
MAX_UNEVEN_BLOCKS = 256


def choose_splits(tiles: int, blocks: int, num_sms: int, even: bool) -> int:
    """The number of splits with the least modelled time; the smaller of equals.

    Args:
        tiles: sequences x key heads x row tiles.
        blocks: key blocks of the longest sequence.
        num_sms: of the card.
        even: all sequences have so many blocks.
    """
    if tiles <= 0 or blocks <= 1:
        return 1
    least = 1 if even else -(-blocks // MAX_UNEVEN_BLOCKS)

    def cost(splits: int) -> float:
        ctas_per_sm = -(-tiles * splits // num_sms)
        merge = MERGE_COST + PART_COST * splits if splits > 1 else 0.0
        return ctas_per_sm * (-(-blocks // splits) + CTA_COST) + merge

    most = min(blocks, MAX_SPLITS)
    return min(range(min(least, most), most + 1), key=cost)
