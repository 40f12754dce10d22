"""Q as TMA brings it: tiles whose rows are tokens, or tokens and the heads of one key head."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..common.kv import KvTile
from . import pair
from .clear import clear_rows
from .rings import Ring
from .rows import RowMap
from .tiles import BLOCK_M, TileConfig
from .work import Work


@dataclass(frozen=True)
class QueryTile:
    """The shape of a Q tile in shared memory, and of the boxes that fill it: one swizzle chunk.

    `block` is the tile as a block of rows; a box holds its first `rows.used` rows, token after
    token, each with the heads of one key head.
    """

    block: KvTile
    rows: RowMap

    def box_layout(self, tiles: int) -> cute.Layout:
        """Shared memory as (group, tokens, chunk, chunks, tiles)."""
        group, chunk = self.rows.group, self.block.chunk
        per_tile = BLOCK_M * self.block.head_dim
        return cute.make_layout(
            (group, self.rows.tokens, chunk, self.block.num_chunks, tiles),
            stride=(chunk, group * chunk, 1, BLOCK_M * chunk, per_tile),
        )

    def tma_load(self, mQ: cute.Tensor, op):
        """The copy atom and TMA tensor that load one box of mQ (group, s, d, h / group, ...)."""
        group, tokens, chunk = self.rows.group, self.rows.tokens, self.block.chunk
        box = cute.make_layout((group, tokens, chunk), stride=(chunk, group * chunk, 1))
        layout = cute.make_composed_layout(self.block.swizzle, 0, box)
        return cpasync.make_tiled_tma_atom(op, mQ, layout, (group, tokens, chunk))

    @property
    def num_bytes(self) -> int:
        """What TMA brings for one tile."""
        return self.rows.used * self.block.head_dim * self.block.dtype.width // 8


@dataclass(frozen=True)
class QueryLoader:
    """Feeds the slots of Q from `mQ`, a TMA tensor, for the role that has it."""

    cfg: Constexpr[TileConfig]
    tile: Constexpr[QueryTile]
    atom: cute.CopyAtom
    mQ: cute.Tensor
    sQ: cute.Tensor  # (128, d, tiles)
    ring: Ring

    @cute.jit
    def clear_idle_rows(self):
        """Rows that no copy fills: their scores are of no one, but shall be numbers."""
        used = self.tile.rows.used
        if const_expr(used < BLOCK_M):
            for tile in cutlass.range_constexpr(self.cfg.q_tiles):
                clear_rows(self.sQ[None, None, tile], Int32(used))

    @cute.jit
    def boxes(self, work: Work):
        """(copy, chunks, tiles) in shared and (copy, tiles of tokens, chunks) in global memory."""
        head, offset = work.tile.head, (0, work.seqlen.offset_q, 0)
        if const_expr(cute.rank(self.mQ) == 5):
            mQ = self.mQ[None, None, None, head, work.tile.batch]
        else:
            mQ = self.mQ[None, None, None, head]
        rows, chunk = self.tile.rows, self.tile.block.chunk
        shape = (rows.group, rows.tokens, chunk)
        gQ = cute.local_tile(cute.domain_offset(offset, mQ), shape, (0, None, None))
        sQ = cute.make_tensor(self.sQ.iterator, self.tile.box_layout(self.cfg.q_tiles))
        return cpasync.tma_partition(
            self.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sQ, 0, 3),
            cute.group_modes(gQ, 0, 3),
        )

    @cute.jit
    def load(self, boxes: tuple, work: Work, tile: Constexpr[int], phase: Int32):
        """One Q tile of `work`, whose `boxes` are given."""
        cfg, (tQsQ, tQgQ) = self.cfg, boxes
        source = (work.tile.m_block * cfg.q_tiles + tile) * cfg.ctas + pair.rank(cfg.ctas)
        per_part = self.tile.block.num_chunks // cfg.q_parts
        for part in cutlass.range_constexpr(cfg.q_parts):
            slot = tile * cfg.q_parts + part
            self.ring.wait_empty(slot, phase)
            self.ring.expect("load", slot, self.tile.num_bytes // cfg.q_parts)
            for chunk in cutlass.range_constexpr(part * per_part, (part + 1) * per_part):
                cute.copy(
                    self.atom,
                    tQgQ[None, source, chunk],
                    tQsQ[None, chunk, tile],
                    tma_bar_ptr=self.ring.full(slot),
                )
