"""Tiles that TMA brings: their layout in shared memory, and where they come from."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

SWIZZLE_BITS = {64: 3, 32: 2, 16: 1}  # by columns of one atom: 128, 64 and 32 bytes
# Policies of the L2 cache as `createpolicy` makes them, for all of a copy's bytes.
EVICT_NORMAL = 0x1000000000000000
EVICT_FIRST = 0x12F0000000000000


@dataclass(frozen=True)
class TmaOperand:
    """A copy atom, the tensor it reads as (rows, d, heads[, batch]), and where its tiles land."""

    atom: cute.CopyAtom
    mX: cute.Tensor
    sX: cute.Tensor  # (rows, d, slots)

    @cute.jit
    def tiles(self, head: Int32, batch: Int32, offset: Int32, column=0):
        """Slots in shared memory and tiles in global memory of one head of one sequence.

        `column` counts tiles along d, where they are narrower than it.
        """
        if const_expr(cute.rank(self.mX) == 4):
            mX = cute.domain_offset((offset, 0), self.mX[None, None, head, batch])
        else:
            mX = cute.domain_offset((offset, 0), self.mX[None, None, head])
        shape = (cute.size(self.sX, mode=[0]), cute.size(self.sX, mode=[1]))
        gX = cute.local_tile(mX, shape, (None, column))
        return cpasync.tma_partition(
            self.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(self.sX, 0, 2),
            cute.group_modes(gX, 0, 2),
        )


def smem_layout(rows: int, columns: int, slots: int, width: int) -> cute.ComposedLayout:
    """(rows, columns, slots), columns contiguous, in swizzle atoms of 8 rows x `width` columns.

    Neither `ldmatrix` nor the tensor core meets a bank twice in it.
    """
    atom = cute.make_composed_layout(
        cute.make_swizzle(SWIZZLE_BITS[width], 4, 3),
        0,
        cute.make_layout((8, width), stride=(width, 1)),
    )
    return cute.tile_to_shape(atom, (rows, columns, slots), order=(0, 1, 2))


def rows_first(mX: cute.Tensor) -> cute.Tensor:
    """(b, s, h, d) as (s, d, h, b); (total, h, d) as (total, d, h)."""
    mode = [1, 3, 2, 0] if cute.rank(mX) == 4 else [0, 2, 1]
    return cute.make_tensor(mX.iterator, cute.select(mX.layout, mode=mode))
