"""Zeros in tiles of shared memory where no copy brings anything that counts."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from .tiles import BLOCK_N, WARP_SIZE

CLEAR_ELEMENTS = 8  # 16 bytes a store


@cute.jit
def clear_rows(sV: cute.Tensor, rows: Int32):
    """Zero the rows >= `rows` of a tile (128, d), by one warp."""
    per_row = cute.size(sV, mode=[1]) // CLEAR_ELEMENTS
    zeros = cute.make_rmem_tensor(CLEAR_ELEMENTS, sV.element_type)
    zeros.fill(0.0)
    missing = (BLOCK_N - rows) * per_row
    for i in cutlass.range(cute.arch.lane_idx(), missing, WARP_SIZE, unroll=1):
        target = cute.local_tile(sV, (1, CLEAR_ELEMENTS), (rows + i // per_row, i % per_row))
        cute.autovec_copy(
            zeros, cute.make_tensor(target.iterator, cute.make_layout(CLEAR_ELEMENTS))
        )
    # The tensor core reads the block through the async proxy.
    cute.arch.fence_proxy("async.shared", space="cta")
