"""Into how many parts the keys of a decode launch are split.

A CTA streams one split of one (sequence, key head, row tile). The card is busy as long as every SM
has bytes to wait for, so the time of a launch is that of the SM with the most to do:

    ceil(tiles * splits / SMs) CTAs  x  (blocks per split + start and end of a CTA)

in units of one block, plus the merge. It depends on shapes and maxima only, so a captured graph may
replay at other lengths: each sequence divides its own blocks by the number of splits.
"""

MAX_SPLITS = 256  # what the combine kernel merges
# In units of one block of 64 keys at d 128, about 1 us of one SM at its share of the bandwidth.
CTA_COST = 0.5  # start and end of a CTA that other CTAs of the SM do not hide
MERGE_COST = 2.0  # a combine launch that starts while the decode kernel ends
PART_COST = 0.02  # a further part to write and read


def choose_splits(tiles: int, blocks: int, num_sms: int) -> int:
    """The number of splits with the least modelled time; the smaller of equals.

    Args:
        tiles: sequences x key heads x row tiles.
        blocks: key blocks of the longest sequence.
        num_sms: of the card.
    """
    if tiles <= 0 or blocks <= 1:
        return 1

    def cost(splits: int) -> float:
        ctas_per_sm = -(-tiles * splits // num_sms)
        merge = MERGE_COST + PART_COST * splits if splits > 1 else 0.0
        return ctas_per_sm * (-(-blocks // splits) + CTA_COST) + merge

    return min(range(1, min(blocks, MAX_SPLITS) + 1), key=cost)
