"""The schedule role: a warp takes a CTA's tiles from a counter that all CTAs of a launch share."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.scheduler import TileScheduler
from .order import Sequences
from .rings import TileRings
from .tiles import WARP_SIZE
from .turns import (
    BATCH,
    BATCH_K,
    HEAD,
    M_BLOCK,
    NO_TILE,
    OFFSET_K,
    OFFSET_Q,
    SEQLEN_K,
    SEQLEN_Q,
    SPLIT,
    slot_of,
)


@dataclass(frozen=True)
class ScheduleRole:
    """Consumes what the load role asks, produces tiles: this CTA's first, then one an answer.

    A CTA's first tile has its own number in the order of `Sequences`; the counter, which begins
    with 0, gives the numbers behind those. Only tiles that exist have a number; where they end, all
    roles are told so. The load role asks when the last keys of a tile are due, so that the answer
    is there in time, and yet no tile is promised to a CTA that is late.
    """

    block_tokens: Constexpr[int]
    scheduler: TileScheduler
    rings: TileRings

    @cute.jit
    def run(self, args: ForwardArgs):
        rings, num_batch = self.rings, self.scheduler.num_batch.divisor
        shared = self.scheduler.num_heads.divisor
        if const_expr(args.mWorkspace is not None):
            shared = shared * args.num_splits
        index, _, _ = cute.arch.block_idx()
        first, before, sequences = Int32(-WARP_SIZE), Int32(0), Sequences.none()
        turn, goes_on = Int32(0), Boolean(True)
        while goes_on:
            # A CTA's tiles come in order: it passes over each sequence once.
            while index - before >= sequences.total and first + WARP_SIZE < num_batch:
                before += sequences.total
                first += WARP_SIZE
                sequences = Sequences.of(args, first, num_batch, (self.block_tokens, shared))
            goes_on = index - before < sequences.total
            slot, phase = slot_of(turn)
            rings.tile.wait_empty(slot, phase)
            if goes_on:
                self.write(sequences, index - before - sequences.begin, slot)
            elif cute.arch.lane_idx() == 0:
                self.rings.sTile[M_BLOCK, slot] = NO_TILE
            rings.tile.arrive_full("schedule", slot)
            if goes_on:
                rings.ask.wait_full(0, turn & 1)
                index = self.next_index(args, shared)
            turn += 1

    @cute.jit
    def write(self, sequences: Sequences, number: Int32, slot: Int32):
        """The tile with this number of the lane's sequence, by the lane that has it."""
        if number >= 0 and number < sequences.tiles:
            heads = self.scheduler.num_heads.divisor
            seqlen = sequences.seqlen
            blocks = cute.ceil_div(seqlen.seqlen_q, self.block_tokens)
            shared = sequences.tiles // blocks
            head = number % shared
            found = {
                M_BLOCK: blocks - 1 - number // shared,
                HEAD: head % heads,
                BATCH: sequences.batch,
                SPLIT: head // heads,
                OFFSET_Q: seqlen.offset_q,
                OFFSET_K: seqlen.offset_k,
                SEQLEN_Q: seqlen.seqlen_q,
                SEQLEN_K: seqlen.seqlen_k,
                BATCH_K: seqlen.batch_k,
            }
            for word, value in found.items():
                self.rings.sTile[word, slot] = value

    @cute.jit
    def next_index(self, args: ForwardArgs, shared: Int32) -> Int32:
        """The number of the next tile that no CTA has; behind all tiles where none is left."""
        assert args.mTileCounter is not None, "else there is no such role"
        grid, _, _ = cute.arch.grid_dim()
        most = self.scheduler.num_m_blocks * self.scheduler.num_batch.divisor * shared
        index = most
        # With a CTA for each of them, nobody has cleared the counter.
        if grid < most:
            count = Int32(0)
            if cute.arch.lane_idx() == 0:
                count = cute.arch.atomic_add(
                    args.mTileCounter.iterator, Int32(1), sem="relaxed", scope="gpu"
                )
            index = grid + cute.arch.shuffle_sync(count, 0)
        return index
