"""The order of tiles where sequences differ: the one with the most keys first.

Tiles of a sequence follow each other, the last ones first, heads side by side. Ranks are found out
by a warp that has a sequence in each lane: of more sequences than that, 32 after 32.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..arguments import ForwardArgs
from ..common.scheduler import TileScheduler, WorkTile
from ..common.seqlen import SeqlenInfo
from .tiles import WARP_SIZE


@dataclass(frozen=True)
class Sequences:
    """Up to 32 sequences in the order of their keys, one in each lane of a warp.

    The lane's sequence `batch` has `tiles` tiles, which stand behind `begin` others of the `total`.
    A lane without a sequence has no tile.
    """

    batch: Int32
    seqlen: SeqlenInfo
    tiles: Int32
    begin: Int32
    total: Int32

    @staticmethod
    @cute.jit
    def none() -> "Sequences":
        zero = Int32(0)
        return Sequences(zero, SeqlenInfo(zero, zero, zero, zero, zero), zero, zero, zero)

    @staticmethod
    @cute.jit
    def of(args: ForwardArgs, first: Int32, num_batch: Int32, tiles: tuple) -> "Sequences":
        """Those from number `first` on; `tiles` is the tokens of one, and how many share them."""
        block_tokens, shared = tiles
        lane = cute.arch.lane_idx()
        batch = cutlass.min(first + lane, num_batch - 1)
        seqlen = SeqlenInfo.of(args, batch)
        own = cute.ceil_div(seqlen.seqlen_q, block_tokens) * shared
        own = own if first + lane < num_batch else 0
        begin, total = Int32(0), Int32(0)
        for other in cutlass.range(cutlass.min(num_batch - first, WARP_SIZE), unroll=4):
            keys = cute.arch.shuffle_sync(seqlen.seqlen_k, other)
            theirs = cute.arch.shuffle_sync(own, other)
            total += theirs
            if keys > seqlen.seqlen_k or (keys == seqlen.seqlen_k and other < lane):
                begin += theirs
        return Sequences(batch, seqlen, own, begin, total)


@cute.jit
def tile_of_index(args: ForwardArgs, scheduler: TileScheduler, index: Int32) -> WorkTile:
    """The tile of rank `index` < num_tiles; by whole warps.

    All sequences count as many tiles as the longest. Of more than 32, tiles that are equally far
    from the beginning of theirs run together (`TileScheduler`).
    """
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
