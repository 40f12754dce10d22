"""The order of tiles where sequences differ: the one with the most keys first.

Tiles of a sequence follow each other, the last ones first, and each CTA takes one when an SM is
free. Of up to 32 sequences, each warp finds out their ranks by itself; of more, none is a large
part of the whole, and tiles that are equally far from the beginning of their sequences run together
(`TileScheduler`): under a causal mask, these are equally long.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..arguments import ForwardArgs
from ..common.scheduler import TileScheduler, WorkTile
from ..common.seqlen import SeqlenInfo
from .tiles import WARP_SIZE


@cute.jit
def tile_of_index(args: ForwardArgs, scheduler: TileScheduler, index: Int32) -> WorkTile:
    """The tile of rank `index` < num_tiles; by whole warps."""
    tile = scheduler.tile(index)
    m_block, head, batch = tile.m_block, tile.head, tile.batch
    # Two questions: one is answered at trace time, one at run time.
    if const_expr(args.mCuSeqlensK is not None or args.mSeqUsedK is not None):  # noqa: SIM102
        if scheduler.num_batch.divisor <= WARP_SIZE:
            rest = index // scheduler.num_heads.divisor
            rank = rest // scheduler.num_m_blocks
            m_block = scheduler.num_m_blocks - 1 - rest % scheduler.num_m_blocks
            batch = sequence_of_rank(args, scheduler.num_batch.divisor, rank)
    return WorkTile(m_block, head, batch)


@cute.jit
def sequence_of_rank(args: ForwardArgs, num_batch: Int32, rank: Int32) -> Int32:
    """The sequence that has the rank-th most keys of `num_batch` <= 32; equals keep their order."""
    lane = cute.arch.lane_idx()
    keys, own_rank = Int32(-1), Int32(0)
    if lane < num_batch:
        keys = SeqlenInfo.of(args, lane).seqlen_k
    for other in cutlass.range(num_batch, unroll=4):
        theirs = cute.arch.shuffle_sync(keys, other)
        if theirs > keys or (theirs == keys and other < lane):
            own_rank += 1
    found = cute.arch.vote_ballot_sync(lane < num_batch and own_rank == rank)
    # One bit is set: as many are set below it as its lane's number.
    return cute.arch.make_warp_uniform(cute.arch.popc(found - 1))
