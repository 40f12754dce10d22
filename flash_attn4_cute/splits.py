"""Into how many parts the keys of a decode launch are split.

A CTA streams one split of one (sequence, key head, row tile), and streams `CTA_RATE` times as fast
as the memory feeds one SM if all of them ask. So fewer CTAs than SMs saturate the memory, and more
only cost a merge. In units of one key block at an SM's share of the bandwidth, for `full` CTAs a SM
and `rest` more,

    time = full * blocks  +  max(rest * blocks / SMs, CTA_START + blocks / CTA_RATE)  +  the merge

It depends on shapes and maxima only, so a captured graph may replay at other lengths: each sequence
divides its own blocks by the number of splits.

Fitted to an H200 as sm_90a, 2026-11-29, 17 shapes of d128 bf16 (benchmarks/results): what it picks
is at most 1.2 % slower than the best number of splits that was tried.
"""

import functools
from typing import Any

MAX_SPLITS = 256  # what the combine kernel merges
LENGTH_STEPS = 32  # of planned lengths while they double
SHORTEST_STEP = 64  # keys, the blocks of most decode kernels
CTA_RATE, CTA_START = 1.8, 0.5
MERGE_COST = 1.0  # a combine launch that starts while the decode kernel ends
PARTIAL_COST = 2.0  # writing and reading one CTA's partial result
# Where lengths differ, the longest sequence may be alone: no CTA streams more than this of it.
MAX_UNEVEN_BLOCKS = 256


def planned_length(longest: Any) -> Any:
    """The bound of the key lengths that a plan sees: rounded up, so that it seldom changes.

    Up to a multiple of 64, or of 1/32 of the power of two below, whichever is more. Serving
    engines pass another bound at each step of a decode; what is planned for one of these serves
    all that are rounded to it. What is no plain, positive int is left as it is.
    """
    if type(longest) is not int or longest <= 0:
        return longest
    step = SHORTEST_STEP
    if longest > 2 * LENGTH_STEPS * SHORTEST_STEP:
        step = (1 << longest.bit_length()) // (2 * LENGTH_STEPS)
    return -(-longest // step) * step


@functools.lru_cache(maxsize=4096)
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
    most = min(blocks, MAX_SPLITS)
    return min(
        range(min(least, most), most + 1),
        key=lambda splits: modelled_time(tiles, blocks, num_sms, splits),
    )


def modelled_time(tiles: int, blocks: int, num_sms: int, splits: int) -> float:
    """Of a launch, in units of one key block at an SM's share of the bandwidth."""
    per_cta = -(-blocks // splits)
    ctas = tiles * -(-blocks // per_cta)  # that have keys
    full, rest = divmod(ctas, num_sms)
    time = float(full * per_cta)
    if rest:
        time += max(rest * per_cta / num_sms, CTA_START + per_cta / CTA_RATE)
    if splits > 1:
        time += MERGE_COST + PARTIAL_COST * tiles * splits / num_sms
    return time


# For the forward kernel, in units of one block of keys for one tile of queries (about 2.6
# us at d 128 on an H200). Modelled from the times of its parts; no split launch has been timed.
TILE_COST = 2.0  # what a tile takes outside of its key loop
FORWARD_MERGE_COST = 2.0
FORWARD_PART_COST = 0.025  # one tile's partial results, written and read, shared by all SMs
WORTH_IT = 0.8  # of the time without splits: a split must promise as much


def choose_forward_splits(tiles: int, blocks: int, num_sms: int) -> int:
    """The number of splits for the forward kernel; 1 unless they fill SMs that would lie idle."""
    if not 0 < tiles < num_sms or blocks <= 1:
        return 1

    def cost(splits: int) -> float:
        rounds = -(-tiles * splits // num_sms)
        merge = FORWARD_MERGE_COST + FORWARD_PART_COST * tiles * splits if splits > 1 else 0.0
        return rounds * (-(-blocks // splits) + TILE_COST) + merge

    best = min(range(1, min(blocks, MAX_SPLITS) + 1), key=cost)
    return best if cost(best) <= WORTH_IT * cost(1) else 1
