"""Where the keys and values of a sequence lie, and how one block of them reaches shared memory.

A block is (block_n, d) in shared memory: columns in chunks of one swizzle atom's width, the rows of
a chunk one after the other. It is filled by boxes, one TMA instruction each, of `box_n` rows of one
chunk. Dense and packed keys take boxes of the whole block; pages take boxes that lie in one page.
The swizzle XORs bits of the absolute address, so a box may begin at any row whose address is a
multiple of 128 bytes.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..tiles import WARP_SIZE

BOXES_UNROLLED = 4
SWIZZLE_BITS = {128: 3, 64: 2, 32: 1}  # by bytes of one row of the atom
SWIZZLE_BASE = 4  # 16-byte units move
SWIZZLE_SHIFT = 3


@dataclass(frozen=True)
class KvTile:
    """The shape of one block of K or V in shared memory, known at trace time."""

    dtype: type[cutlass.Numeric]
    block_n: int
    head_dim: int
    chunk: int  # columns of one swizzle atom
    box_n: int  # rows of one TMA box

    @property
    def swizzle(self) -> cute.Swizzle:
        bits = SWIZZLE_BITS[self.chunk * self.dtype.width // 8]
        return cute.make_swizzle(bits, SWIZZLE_BASE, SWIZZLE_SHIFT)

    @property
    def num_boxes(self) -> int:
        return self.block_n // self.box_n

    @property
    def num_chunks(self) -> int:
        return self.head_dim // self.chunk

    def layout(self, stages: int) -> cute.Layout:
        """(block_n, d, stages), before the swizzle."""
        return cute.make_layout(
            (self.block_n, (self.chunk, self.num_chunks), stages),
            stride=(
                self.chunk,
                (1, self.block_n * self.chunk),
                self.block_n * self.head_dim,
            ),
        )

    def box_layout(self, stages: int) -> cute.Layout:
        """The same memory as (box_n, chunk, boxes, chunks, stages)."""
        return cute.make_layout(
            (self.box_n, self.chunk, self.num_boxes, self.num_chunks, stages),
            stride=(
                self.chunk,
                1,
                self.box_n * self.chunk,
                self.block_n * self.chunk,
                self.block_n * self.head_dim,
            ),
        )

    def tma_load(self, mX: cute.Tensor):
        """The copy atom and TMA tensor that load one box of mX (rows, d, ...)."""
        layout = cute.make_composed_layout(
            self.swizzle,
            0,
            cute.make_layout((self.box_n, self.chunk), stride=(self.chunk, 1)),
        )
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), mX, layout, (self.box_n, self.chunk)
        )


@cute.jit
def boxes(atom: cute.CopyAtom, sX: cute.Tensor, mX: cute.Tensor):
    """(slots of shared memory, boxes of mX (rows, d, ...)), partitioned for copies of one box."""
    shape = (cute.size(sX, mode=[0]), cute.size(sX, mode=[1]))
    gX = cute.local_tile(mX, shape, (None,) * cute.rank(mX))
    return cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(sX, 0, 2),
        cute.group_modes(gX, 0, 2),
    )


@dataclass(frozen=True)
class DenseKv:
    """K or V of one head of one sequence that lies in one piece."""

    tile: Constexpr[KvTile]
    atom: cute.CopyAtom
    tXsX: Any  # (copy, boxes, chunks, stages)
    tXgX: Any  # (copy, blocks, chunks)

    @staticmethod
    @cute.jit
    def of(tile: Constexpr[KvTile], tma, sX: cute.Tensor, where):
        """`tma` from KvTile.tma_load, `sX` by KvTile.box_layout, `where` (head, batch, offset)."""
        atom, mX = tma
        head, batch, offset = where
        if const_expr(cute.rank(mX) == 4):
            mX = cute.domain_offset((offset, 0), mX[None, None, head, batch])
        else:
            mX = cute.domain_offset((offset, 0), mX[None, None, head])
        tXsX, tXgX = boxes(atom, sX, mX)
        return DenseKv(tile, atom, tXsX, tXgX)

    @cute.jit
    def look_up(self, block: Int32) -> cute.Tensor:
        """Nothing needs looking up."""
        nothing = cute.make_rmem_tensor(1, Int32)
        nothing.fill(0)
        return nothing

    @cute.jit
    def copy(self, block: Int32, slot: Int32, barrier: cute.Pointer, _: cute.Tensor):
        """Fill `slot` with block `block`; rows past the end of the memory become 0."""
        for chunk in cutlass.range_constexpr(self.tile.num_chunks):
            cute.copy(
                self.atom,
                self.tXgX[None, block, chunk],
                self.tXsX[None, 0, chunk, slot],
                tma_bar_ptr=barrier,
            )


@dataclass(frozen=True)
class PagedKv:
    """K or V of one head of one sequence in pages, found through its row of the page table.

    A box lies in one page: its rows are the greatest common divisor of the page and the block. The
    lanes of the loading warp look up a block's pages, one a lane, and every lane then learns each.
    """

    tile: Constexpr[KvTile]
    atom: cute.CopyAtom
    tXsX: Any  # (copy, boxes, chunks, stages)
    tXgX: Any  # (copy, boxes of a page, chunks, pages)
    mPages: cute.Tensor  # this sequence's row of the page table
    page_size: Int32
    num_pages: Int32
    seqlen: Int32

    @staticmethod
    @cute.jit
    def of(tile: Constexpr[KvTile], tma, sX: cute.Tensor, where, mPages: cute.Tensor):
        """`tma` of (page_size, d, heads, pages); `where` is (head, seqlen_k)."""
        atom, mX = tma
        head, seqlen = where
        tXsX, tXgX = boxes(atom, sX, mX[None, None, head, None])
        page_size, num_pages = cute.size(mX, mode=[0]), cute.size(mX, mode=[3])
        return PagedKv(tile, atom, tXsX, tXgX, mPages, Int32(page_size), Int32(num_pages), seqlen)

    @cute.jit
    def look_up(self, block: Int32) -> cute.Tensor:
        """Pages of the boxes of `block`: lane l holds those of boxes l, l + 32, ...

        Entries past the end of the sequence may be anything and are not read: their boxes name a
        page that does not exist, so TMA fills them with zeros and counts their bytes all the same.
        """
        pages = cute.make_rmem_tensor(-(-self.tile.num_boxes // WARP_SIZE), Int32)
        for i in cutlass.range_constexpr(cute.size(pages)):
            box = cute.arch.lane_idx() + WARP_SIZE * i
            key = block * self.tile.block_n + box * self.tile.box_n
            pages[i] = self.num_pages
            if key >= 0 and key < self.seqlen and box < self.tile.num_boxes:
                pages[i] = self.mPages[key // self.page_size]
        return pages

    @cute.jit
    def copy(self, block: Int32, slot: Int32, barrier: cute.Pointer, pages: cute.Tensor):
        """Fill `slot` with block `block`, whose pages `look_up` found."""
        boxes_per_page = self.page_size // self.tile.box_n
        for i in cutlass.range_constexpr(cute.size(pages)):
            first = WARP_SIZE * i
            last = min(first + WARP_SIZE, self.tile.num_boxes)
            for box in cutlass.range(first, last, unroll=BOXES_UNROLLED):
                page = cute.arch.shuffle_sync(pages[i], box - first)
                box_of_page = (block * self.tile.num_boxes + box) % boxes_per_page
                for chunk in cutlass.range_constexpr(self.tile.num_chunks):
                    cute.copy(
                        self.atom,
                        self.tXgX[None, box_of_page, chunk, page],
                        self.tXsX[None, box, chunk, slot],
                        tma_bar_ptr=barrier,
                    )
