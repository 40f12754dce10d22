"""Where the keys and values of a sequence lie, and how one block of them reaches shared memory.

A block is (block_n, d) in shared memory: columns in chunks of one swizzle atom's width, the rows of
a chunk one after the other. It is filled by boxes of `box_n` rows. Dense and packed keys take boxes
of the whole block; pages take boxes that lie in one page. Where a box fills whole swizzle atoms,
its chunks lie side by side and one TMA instruction brings all of them: with small pages, issuing
instructions is what bounds the loading warp. Else, and where the tensor is narrower than its tiles,
every chunk takes an instruction of its own. The swizzle XORs bits of the absolute address, so a box
may begin at any row whose address is a multiple of 128 bytes.

Pages that leave no room for a box of some rows are gathered instead, row by row, by cp.async.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op

from ..tiles import WARP_SIZE

BOXES_UNROLLED = 8
SWIZZLE_BITS = {128: 3, 64: 2, 32: 1}  # by bytes of one row of the atom
SWIZZLE_BASE = 4  # 16-byte units move
SWIZZLE_SHIFT = 3
ATOM_ROWS = 8  # after which the swizzle repeats
COPY_BYTES = 16  # of one cp.async of a lane
COPIES_UNROLLED = 4


@dataclass(frozen=True)
class KvTile:
    """The shape of one block of K or V in shared memory, known at trace time."""

    dtype: type[cutlass.Numeric]
    block_n: int
    head_dim: int
    chunk: int  # columns of one swizzle atom
    box_n: int  # rows of one TMA box
    whole_boxes: bool = False  # one instruction brings all chunks of a box
    boxes_unrolled: int = BOXES_UNROLLED
    box_by_box: bool = True  # else all rows of a chunk follow each other, as tcgen05 wants them
    slot_columns: int = 0  # of a slot, if it is wider than the block

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

    @property
    def box_rows(self) -> int:
        """Rows of a chunk that lie one after the other."""
        return self.box_n if self.box_by_box and self.box_n % ATOM_ROWS == 0 else self.block_n

    def layout(self, stages: int) -> cute.Layout:
        """(block_n, d, stages), before the swizzle."""
        rows = self.box_rows
        return cute.make_layout(
            ((rows, self.block_n // rows), (self.chunk, self.num_chunks), stages),
            stride=(
                (self.chunk, rows * self.head_dim),
                (1, rows * self.chunk),
                self.block_n * self.head_dim,
            ),
        )

    def box_layout(self, stages: int) -> cute.Layout:
        """The same memory as (box_n, chunk, chunks, boxes, stages)."""
        rows = self.box_rows
        return cute.make_layout(
            (self.box_n, self.chunk, self.num_chunks, self.num_boxes, stages),
            stride=(
                self.chunk,
                1,
                rows * self.chunk,
                self.box_n * (self.head_dim if rows == self.box_n else self.chunk),
                self.block_n * (self.slot_columns or self.head_dim),
            ),
        )

    def fitted(self, mX: cute.Tensor) -> "KvTile":
        """This tile, for loading mX (rows, d, ...)."""
        whole = cute.size(mX, mode=[1]) == self.head_dim and self.box_rows == self.box_n
        return replace(self, whole_boxes=whole and self.num_chunks > 1)

    def tma_load(self, mX: cute.Tensor, op: Any = None):
        """The copy atom and TMA tensor that load one box of mX (rows, d, ...), by `op` or TMA.

        With whole boxes, the tensor is (rows, chunk, chunks, ...).
        """
        shape, stride = [self.box_n, self.chunk], [self.chunk, 1]
        if self.whole_boxes:
            shape, stride = [*shape, self.num_chunks], [*stride, self.box_n * self.chunk]
            (rows, _, *outer), (s_rows, _, *s_outer) = mX.shape, mX.stride
            in_chunks = cute.make_layout(
                (rows, self.chunk, self.num_chunks, *outer),
                stride=(s_rows, 1, self.chunk, *s_outer),
            )
            mX = cute.make_tensor(mX.iterator, in_chunks)
        box = cute.make_layout(tuple(shape), stride=tuple(stride))
        layout = cute.make_composed_layout(self.swizzle, 0, box)
        op = op or cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(op, mX, layout, tuple(shape))

    @property
    def rank(self) -> int:
        """Modes of the TMA tensor that rows and columns take."""
        return 3 if self.whole_boxes else 2

    def of_head(self, mX: cute.Tensor, head: Int32) -> cute.Tensor:
        """The TMA tensor mX of one head: (rows, d, ...) or (rows, chunk, chunks, ...)."""
        others = (None,) * (cute.rank(mX) - self.rank - 1)
        return mX[(*(None,) * self.rank, head, *others)]


def of_chunks(mX: cute.Tensor, chunk: int) -> cute.Tensor:
    """The TMA tensor mX (rows, d, ...) as if it had two chunks; TMA itself still ends at d.

    A mode of one chunk would have no stride, so that every further chunk is that one again, and
    keys of -inf would meet the zeros that pad the query; beyond two, strides go on as they are.
    """
    rows, _, *outer = mX.shape
    layout = cute.make_layout((rows, 2 * chunk, *outer), stride=mX.stride)
    return cute.make_tensor(mX.iterator, layout)


@dataclass(frozen=True)
class BoxCopies:
    """The copies of boxes of one head's K or V into the slots of a ring, from a chunk on."""

    tile: Constexpr[KvTile]
    atom: cute.CopyAtom
    tXsX: Any  # (copy, chunks, boxes, stages), or without chunks if a copy takes all of them
    tXgX: Any  # (copy, boxes, chunks, ...), chunks being two modes if a copy takes all of them
    first_chunk: Any
    policy: Any = None  # of the L2 cache, one of common.tma's; None is its own

    @staticmethod
    @cute.jit
    def of(
        tile: Constexpr[KvTile],
        atom: cute.CopyAtom,
        sX: cute.Tensor,
        mX: cute.Tensor,
        first_chunk: Any,
        policy: Any = None,
    ):
        """`atom` from KvTile.tma_load, `sX` by KvTile.box_layout, mX the TMA tensor of a head."""
        modes = tile.rank
        if const_expr(not tile.whole_boxes):
            mX = of_chunks(mX, tile.chunk)
        box = tuple(cute.size(sX, mode=[i]) for i in range(modes))
        gX = cute.local_tile(mX, box, (None,) * cute.rank(mX))
        tXsX, tXgX = cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sX, 0, modes),
            cute.group_modes(gX, 0, modes),
        )
        return BoxCopies(tile, atom, tXsX, tXgX, first_chunk, policy)

    @cute.jit
    def copy(self, source: tuple, target: tuple, barrier: cute.Pointer):
        """One box: `source` is (box of the memory[, page]), `target` (box of the block, stage)."""
        box, page = source[0], source[1:]
        if const_expr(self.tile.whole_boxes):
            gX, sX = self.tXgX[(None, box, 0, 0, *page)], self.tXsX[(None, *target)]
            cute.copy(self.atom, gX, sX, tma_bar_ptr=barrier, cache_policy=self.policy)
        else:
            for chunk in cutlass.range_constexpr(self.tile.num_chunks):
                gX = self.tXgX[(None, box, self.first_chunk + chunk, *page)]
                sX = self.tXsX[(None, chunk, *target)]
                cute.copy(self.atom, gX, sX, tma_bar_ptr=barrier, cache_policy=self.policy)


@dataclass(frozen=True)
class DenseKv:
    """K or V of one head of one sequence that lies in one piece."""

    copies: BoxCopies

    @staticmethod
    @cute.jit
    def of(
        tile: Constexpr[KvTile],
        tma,
        sX: cute.Tensor,
        where,
        first_chunk: Any = 0,
        policy: Any = None,
    ):
        """`tma` from KvTile.tma_load, `sX` by KvTile.box_layout, `where` (head, batch, offset)."""
        atom, mX = tma
        head, batch, offset = where
        mX = tile.of_head(mX, head)
        if const_expr(cute.rank(mX) == tile.rank + 1):
            mX = mX[(*(None,) * tile.rank, batch)]
        mX = cute.domain_offset((offset, *(0,) * (tile.rank - 1)), mX)
        return DenseKv(BoxCopies.of(tile, atom, sX, mX, first_chunk, policy))

    @property
    def reach(self) -> int:
        """As PagedKv's."""
        return 1

    @cute.jit
    def look_up(self, block: Int32) -> cute.Tensor:
        """Nothing needs looking up."""
        nothing = cute.make_rmem_tensor(1, Int32)
        nothing.fill(0)
        return nothing

    @cute.jit
    def copy(self, block: Int32, slot: Int32, barrier: cute.Pointer, _: tuple):
        """Fill `slot` with block `block`; rows past the end of the memory become 0."""
        self.copies.copy((block,), (0, slot), barrier)


@dataclass(frozen=True)
class PagedKv:
    """K or V of one head of one sequence in pages, found through its row of the page table.

    A box lies in one page: its rows are the greatest common divisor of the page and the block. The
    lanes of the loading warp look up where the boxes of several blocks lie, one a lane, so that the
    blocks that fill an empty ring wait for the table once; each is then told to all lanes.
    """

    copies: BoxCopies
    mPages: cute.Tensor  # this sequence's row of the page table
    page_size: Int32
    num_pages: Int32
    seqlen: Int32

    @staticmethod
    @cute.jit
    def of(
        tile: Constexpr[KvTile],
        tma,
        sX: cute.Tensor,
        where,
        mPages: cute.Tensor,
        first_chunk: Any = 0,
        policy: Any = None,
    ):
        """`tma` of (page_size, d, heads, pages); `where` is (head, seqlen_k)."""
        atom, mX = tma
        head, seqlen = where
        mX = tile.of_head(mX, head)
        page_size, num_pages = cute.size(mX, mode=[0]), cute.size(mX, mode=[tile.rank])
        copies = BoxCopies.of(tile, atom, sX, mX, first_chunk, policy)
        return PagedKv(copies, mPages, Int32(page_size), Int32(num_pages), seqlen)

    @property
    def reach(self) -> int:
        """Blocks whose places one `look_up` finds."""
        return max(WARP_SIZE // self.copies.tile.num_boxes, 1)

    @cute.jit
    def look_up(self, block: Int32) -> cute.Tensor:
        """(page, box of the page) of the boxes of `block` and those before it.

        Lane l holds boxes l, l + 32, ..., boxes of `block` - 1 following those of `block`. Entries
        past the end of the sequence may be anything and are not read: their boxes name a page that
        does not exist, so TMA fills them with zeros and counts their bytes all the same.
        """
        tile = self.copies.tile
        places = cute.make_rmem_tensor((-(-tile.num_boxes // WARP_SIZE), 2), Int32)
        places.fill(0)
        for i in cutlass.range_constexpr(cute.size(places, mode=[0])):
            index = cute.arch.lane_idx() + WARP_SIZE * i
            box = index % tile.num_boxes
            key = (block - index // tile.num_boxes) * tile.block_n + box * tile.box_n
            places[i, 0] = self.num_pages
            if key >= 0 and key < self.seqlen:
                entry = quotient(key, self.page_size)
                places[i, 0] = self.mPages[entry]
                places[i, 1] = (key - entry * self.page_size) // tile.box_n
        return places

    @cute.jit
    def copy(self, block: Int32, slot: Int32, barrier: cute.Pointer, found: tuple):
        """Fill `slot` with block `block`; `found` is (places, blocks since their `look_up`)."""
        places, turn = found
        tile = self.copies.tile
        for i in cutlass.range_constexpr(cute.size(places, mode=[0])):
            first = WARP_SIZE * i
            last = min(first + WARP_SIZE, tile.num_boxes)
            for box in cutlass.range(first, last, unroll=tile.boxes_unrolled):
                lane = box - first + turn * tile.num_boxes
                page = cute.arch.shuffle_sync(places[i, 0], lane)
                box_of_page = cute.arch.shuffle_sync(places[i, 1], lane)
                self.copies.copy((box_of_page, page), (box, slot), barrier)


@dataclass(frozen=True)
class GatheredKv:
    """As PagedKv, for pages of any size: one warp copies each row from wherever it lies.

    `mX` (page_size, d, pages) of one head, `slots` the address of the slots in shared memory. Lane
    l looks up rows l, l + 32, ... of a block. Rows past the end of the sequence become 0.
    """

    tile: Constexpr[KvTile]
    mX: cute.Tensor
    slots: Int32
    mPages: cute.Tensor  # this sequence's row of the page table
    seqlen: Int32
    first_column: Int32

    @cute.jit
    def look_up(self, block: Int32) -> cute.Tensor:
        """Pages of the rows of `block`; -1 past the end, where the table is not read."""
        pages = cute.make_rmem_tensor(self.tile.block_n // WARP_SIZE, Int32)
        pages.fill(-1)
        for i in cutlass.range_constexpr(cute.size(pages)):
            key = block * self.tile.block_n + cute.arch.lane_idx() + WARP_SIZE * i
            if key >= 0 and key < self.seqlen:
                pages[i] = self.mPages[key // cute.size(self.mX, mode=[0])]
        return pages

    @cute.jit
    def copy(self, block: Int32, slot: Int32, pages: cute.Tensor):
        """Begin to fill `slot` with block `block`, whose pages `look_up` found."""
        tile, lane = self.tile, cute.arch.lane_idx()
        page_size = cute.size(self.mX, mode=[0])
        row_stride, _, page_stride = self.mX.stride
        per_row = tile.head_dim * tile.dtype.width // 8 // COPY_BYTES
        columns = cute.size(self.mX, mode=[1]) - self.first_column
        columns = columns * tile.dtype.width // 8 // COPY_BYTES
        row_bytes = tile.chunk * tile.dtype.width // 8
        slot_bytes = tile.block_n * (tile.slot_columns or tile.head_dim) * tile.dtype.width // 8
        start = self.slots + slot * slot_bytes
        for i in cutlass.range_constexpr(cute.size(pages)):
            key = block * tile.block_n + lane + WARP_SIZE * i
            offset = Int64(pages[i]) * page_stride + Int64(key % page_size) * row_stride
            offset += self.first_column
            source = self.mX.iterator.toint() + offset * (tile.dtype.width // 8)
            for j in cutlass.range(per_row, unroll=COPIES_UNROLLED):
                number = j * WARP_SIZE + lane
                local, column = number // per_row, number % per_row
                page = cute.arch.shuffle_sync(pages[i], local)
                row_source = cute.arch.shuffle_sync(source, local)
                row = local + WARP_SIZE * i
                inside = column * COPY_BYTES
                target = row * row_bytes + inside % row_bytes
                target += inside // row_bytes * (tile.block_n * row_bytes)
                # The swizzle, of addresses that begin at a multiple of its period.
                mask = (1 << SWIZZLE_BITS[row_bytes]) - 1
                period = SWIZZLE_BASE + SWIZZLE_SHIFT
                target = start + (target ^ ((target >> period & mask) << SWIZZLE_BASE))
                exists = page >= 0 and column < columns
                place = row_source + inside if exists else self.mX.iterator.toint()
                copy_or_clear(target, Int64(place), Int32(COPY_BYTES if exists else 0))


@dsl_user_op
def copy_or_clear(target: Int32, source: Int64, num_bytes: Int32, *, loc=None, ip=None):
    """cp.async of 16 bytes to shared memory, of which those from `num_bytes` on become 0."""
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (Int32(target), Int64(source), Int32(num_bytes))],
        f"cp.async.cg.shared.global [$0], [$1], {COPY_BYTES}, $2;",
        "r,l,r",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


@cute.jit
def quotient(a: Int32, b: Int32) -> Int32:
    """a // b of numbers that are not negative; at once where b is a power of two, as pages are."""
    result = Int32(a >> (31 - Int32(cute.arch.clz(b))))
    if b & (b - 1) != 0:
        result = a // b
    return result
