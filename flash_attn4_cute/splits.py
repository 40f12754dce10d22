"""Into how many parts the keys of a decode launch are split.

A CTA streams one split of one (sequence, key head, row tile), and streams `Pace.rate` times as fast
as the memory feeds one SM if all of them ask. So fewer CTAs than SMs saturate the memory, and more
only cost a merge. In units of one key block at an SM's share of the bandwidth, for `full` CTAs a SM
and `rest` more, a launch takes what is more of

    memory   full * blocks  +  max(rest * blocks / SMs, CTA_START + blocks / rate)
    SMs      starts * CTA_START + most * blocks / rate, for the `most` that one SM gets

and the merge, and what it takes that CTAs end unevenly where nearly every SM has one.

It depends on shapes and maxima only, so a captured graph may replay at other lengths: each sequence
divides its own blocks by the number of splits.

Fitted to an H200 as sm_90a, 2026-11-29, 67 shapes of eight kernels (tests/decode_times.py): what it
picks is at most 2.2 % slower than the best number of splits that was tried.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

MAX_SPLITS = 256  # what the combine kernel merges
LENGTH_STEPS = 32  # of planned lengths while they double
SHORTEST_STEP = 64  # keys, the blocks of most decode kernels
CTA_START = 1.0
MERGE_COST = 1.0  # a combine launch that starts while the decode kernel ends
PARTIAL_COST = 2.0  # writing and reading one CTA's partial result
CROWD_COST, CROWD = 6.0, 0.6  # of each CTA an SM beyond so many, if no SM has two
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


@dataclass(frozen=True, slots=True)
class Pace:
    """How a configuration of the decode kernel streams.

    rate: key blocks of a CTA while the memory feeds an SM one, all of them asking.
    ctas_per_sm: how many an SM holds.
    max_load: CTAs an SM up to which the configuration is worth taking.
    """

    rate: float
    ctas_per_sm: int
    max_load: float = math.inf


@functools.lru_cache(maxsize=4096)
def choose_splits(
    tiles: int, blocks: int, num_sms: int, even: bool, paces: tuple[Pace, ...]
) -> tuple[Pace, int]:
    """The pace and the number of splits with the least modelled time; the first of equals.

    Args:
        tiles: sequences x key heads x row tiles.
        blocks: key blocks of the longest sequence.
        num_sms: of the card.
        even: all sequences have so many blocks.
        paces: of the configurations that there are; one at least has no max_load.
    """
    least = 1 if even else -(-blocks // MAX_UNEVEN_BLOCKS)
    most = max(1, min(blocks, MAX_SPLITS))
    numbers = range(max(1, min(least, most)), most + 1)
    return min(
        (pair for pair in itertools.product(paces, numbers) if fits(*pair, tiles, num_sms)),
        key=lambda pair: modelled_time(tiles, blocks, num_sms, *pair),
    )


def fits(pace: Pace, splits: int, tiles: int, num_sms: int) -> bool:
    """Whether a launch of so many CTAs is what the configuration is for."""
    return tiles * splits <= pace.max_load * num_sms


def modelled_time(tiles: int, blocks: int, num_sms: int, pace: Pace, splits: int) -> float:
    """Of a launch, in units of one key block at an SM's share of the bandwidth."""
    per_cta = -(-blocks // splits)
    ctas = tiles * -(-blocks // max(1, per_cta))  # that have keys
    full, rest = divmod(ctas, num_sms)
    alone = CTA_START + per_cta / pace.rate
    time = full * per_cta + (max(rest * per_cta / num_sms, alone) if rest else 0.0)
    most = busiest(ctas, num_sms, pace.ctas_per_sm)
    starts = -(-most // pace.ctas_per_sm)
    time = max(time, starts * CTA_START + most * per_cta / pace.rate)
    if splits > 1:
        time += MERGE_COST + PARTIAL_COST * tiles * splits / num_sms
    if ctas <= num_sms:
        time += CROWD_COST * max(0.0, ctas / num_sms - CROWD)
    return time


def busiest(ctas: int, num_sms: int, ctas_per_sm: int) -> int:
    """CTAs that the busiest SM gets in all: one if that suffices, else always as many as fit."""
    if ctas <= num_sms:
        return 1
    return ctas_per_sm * -(-ctas // (ctas_per_sm * num_sms))


# For the forward kernel, in units of one block of keys for one tile of queries (about 2.6
# us at d 128 on an H200). Modelled from the times of its parts; no split launch has been timed.
TILE_COST = 2.0  # what a tile takes outside of its key loop
FORWARD_MERGE_COST = 2.0
FORWARD_PART_COST = 0.025  # one tile's partial results, written and read, shared by all SMs
WORTH_IT = 0.8  # of the time without splits: a split must promise as much


@functools.lru_cache(maxsize=4096)
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
