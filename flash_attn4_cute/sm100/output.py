"""O on its way to memory by TMA: a warp's 32 rows of 64 columns are one box."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from .rows import RowMap
from .tiles import BLOCK_M, STAGED_BYTES, WARP_SIZE
from .work import Work


@dataclass(frozen=True)
class OutputTile:
    """The box: as the rows are, whole tokens with the heads of one key head, or part of a token."""

    dtype: type[cutlass.Numeric]
    rows: RowMap

    @staticmethod
    def fits(group: int) -> bool:
        """Whether the 32 rows of every warp are a box; none is idle then."""
        return BLOCK_M % group == 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, tokens, columns)."""
        heads = min(self.rows.group, WARP_SIZE)
        return heads, WARP_SIZE // heads, STAGED_BYTES * 8 // self.dtype.width

    @property
    def layout(self) -> cute.Layout:
        """A box in shared memory, before the swizzle."""
        heads, _, columns = self.shape
        return cute.make_layout(self.shape, stride=(columns, heads * columns, 1))

    def tma_store(self, mO: cute.Tensor):
        """The copy atom and TMA tensor that store one box of mO (group, s, d, h / group, ...)."""
        layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, self.layout)
        op = cpasync.CopyBulkTensorTileS2GOp()
        return cpasync.make_tiled_tma_atom(op, mO, layout, self.shape)


@dataclass(frozen=True)
class OutputStore:
    """Stores boxes of mO, a TMA tensor.

    `ends_with_memory`: a sequence's queries end where its dimension of mO ends, so that TMA itself
    cuts boxes off. Else rows behind them are others', and only whole boxes may be stored.
    """

    tile: Constexpr[OutputTile]
    ends_with_memory: Constexpr[bool]
    atom: cute.CopyAtom
    mO: cute.Tensor

    @cute.jit
    def takes(self, work: Work, tile: Constexpr[int], row: Int32):
        """Whether the warp's rows from `row` on may be stored as a box."""
        return self.ends_with_memory or work.has_row(tile, row + WARP_SIZE - 1)

    @cute.jit
    def store(self, work: Work, at: tuple, chunk: Constexpr[int], sO: cute.Tensor):
        """Begin to store columns chunk * 64 and following; `at` is (Q tile, the warp's first row).

        By one thread, which must wait until sO (128, columns) has been read.
        """
        tile, row = at
        head, offset = work.tile.head, (0, work.seqlen.offset_q, 0)
        if const_expr(cute.rank(self.mO) == 5):
            mO = self.mO[None, None, None, head, work.tile.batch]
        else:
            mO = self.mO[None, None, None, head]
        heads, tokens, columns = self.tile.shape
        place = (work.rows.head(row) // heads, work.token_of(tile, row) // tokens, chunk)
        gO = cute.local_tile(cute.domain_offset(offset, mO), self.tile.shape, place)
        box = cute.make_tensor(sO.iterator + row * columns, self.tile.layout)
        tOsO, tOgO = cpasync.tma_partition(
            self.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(box, 0, 3),
            cute.group_modes(gO, 0, 3),
        )
        cute.copy(self.atom, tOsO, tOgO)
        cute.arch.cp_async_bulk_commit_group()
