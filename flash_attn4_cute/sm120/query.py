"""The query rows of one warp: fetched by the warp itself, read by nobody else.

No barrier but the warp's own is needed, so a warp that has finished a tile fetches the rows of its
next one while it writes its results, whatever the other warps are doing.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..arguments import ForwardArgs
from ..common.scheduler import WorkTile
from ..common.seqlen import SeqlenInfo
from ..tiles import WARP_SIZE, TileConfig

CHUNK = 8  # elements of one 16-byte copy
SWIZZLE_ROWS = 8  # rows after which the swizzle of shared memory repeats


@dataclass(frozen=True)
class QueryRows:
    """Shared memory `sQ` (rows_per_warp, d) for the query rows of one warp."""

    cfg: Constexpr[TileConfig]
    sQ: cute.Tensor

    @cute.jit
    def clear(self, args: ForwardArgs, lane: Int32):
        """Zero the columns that Q does not have, once: K's are zero too, but 0 * NaN is NaN."""
        num_chunks = cute.size(args.mQ, mode=[cute.rank(args.mQ) - 1]) // CHUNK
        per_row = self.cfg.head_dim // CHUNK
        zeros = cute.make_rmem_tensor(CHUNK, self.sQ.element_type)
        zeros.fill(0.0)
        for i in cutlass.range(lane, self.cfg.rows_per_warp * per_row, WARP_SIZE, unroll=1):
            if i % per_row >= num_chunks:
                target = cute.local_tile(self.sQ, (1, CHUNK), (i // per_row, i % per_row))
                cute.autovec_copy(zeros, as_vector(target))

    @cute.jit
    def fetch(self, args: ForwardArgs, work: WorkTile, lane: Int32):
        """Begin to copy this warp's rows of tile `work`; `wait` ends it.

        Rows past the end repeat the last one: their results are not stored. A warp without any row
        fetches too, since it may load its fragments before it knows.
        """
        cfg = self.cfg
        seqlen = SeqlenInfo.of(args, work.batch)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        row = work.m_block * cfg.block_m + warp * cfg.rows_per_warp
        if work.m_block * cfg.block_m < seqlen.seqlen_q:
            if const_expr(cute.rank(args.mQ) == 4):
                mQ = args.mQ[work.batch, None, work.head, None]
            else:
                mQ = cute.domain_offset((seqlen.offset_q, 0), args.mQ[None, work.head, None])
            op = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
            atom = cute.make_copy_atom(op, mQ.element_type, num_bits_per_copy=128)
            # A lane keeps its column, so that its addresses differ by constants only.
            per_row = cfg.head_dim // CHUNK
            rows_at_once = WARP_SIZE // per_row
            column = lane % per_row
            if column < cute.size(mQ, mode=[1]) // CHUNK and lane < rows_at_once * per_row:
                for i in cutlass.range_constexpr(0, cfg.rows_per_warp, rows_at_once):
                    first = i // SWIZZLE_ROWS * SWIZZLE_ROWS
                    local = lane // per_row + i - first
                    source_row = cutlass.min(row + first + local, seqlen.seqlen_q - 1)
                    source = cute.local_tile(mQ, (1, CHUNK), (source_row, column))
                    sQ = cute.local_tile(
                        self.sQ, (SWIZZLE_ROWS, cfg.head_dim), (first // SWIZZLE_ROWS, 0)
                    )
                    target = cute.local_tile(sQ, (1, CHUNK), (local, column))
                    cute.copy(atom, as_vector(source), as_vector(target))
            cute.arch.cp_async_commit_group()

    @cute.jit
    def wait(self):
        """Until every lane sees the rows of the last `fetch`."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_warp()

    @cute.jit
    def interleave(self, lane: Int32):
        """Put the pairs 0, 2, 4, 6, 1, 3, 5, 7 of every 16 columns one after the other.

        `ldmatrix` then brings to a lane the four columns that neighbour each other in K.
        """
        rows, pair = self.cfg.rows_per_warp, 2 * CHUNK
        at_once = WARP_SIZE // rows
        for i in cutlass.range_constexpr(0, self.cfg.head_dim // pair, at_once):
            place = (lane % rows, i + lane // rows)
            both = cute.local_tile(self.sQ, (1, pair), place)
            before, after = (cute.make_rmem_tensor((CHUNK, 2), self.sQ.element_type) for _ in "ab")
            for half in cutlass.range_constexpr(2):
                source = as_vector(cute.local_tile(both, (1, CHUNK), (0, half)))
                cute.autovec_copy(source, before[None, half])
            words, ordered = (cute.recast_tensor(x, Int32) for x in (before, after))
            for word in cutlass.range_constexpr(CHUNK):
                ordered[word // 2 + CHUNK // 2 * (word % 2)] = words[word]
            for half in cutlass.range_constexpr(2):
                target = as_vector(cute.local_tile(both, (1, CHUNK), (0, half)))
                cute.autovec_copy(after[None, half], target)
        cute.arch.sync_warp()


def as_vector(tile: cute.Tensor) -> cute.Tensor:
    """View the 16 bytes of one copy as a vector."""
    return cute.make_tensor(tile.iterator, cute.make_layout(CHUNK))
