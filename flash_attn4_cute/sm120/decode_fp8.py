"""The products of the decode kernel over an fp8 cache: e4m3 becomes the compute type in registers.

To shared memory and to `ldmatrix` a row of d bytes is one of d / 2 elements of 16 bits. A 32-bit
register of K then holds four neighbouring columns of one key. A product sums over columns in any
order, so the four become the two registers of its B operand, and Q is loaded in the same order. A
register of V^T holds two neighbouring columns of two keys: the even columns go to one n8 tile, the
odd ones to the next, and `decode_merge` puts them side by side again.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32

from ..common.fragments import as_operand_a
from .decode_compute import SliceMma


@dataclass(frozen=True)
class Fp8SliceMma(SliceMma):
    """SliceMma for K and V of fp8, given as (keys, d / 2) elements of 16 bits."""

    def query_pair(self, k: int, side: int):
        """Which pair of columns of Q stands at `side` of k16 step k."""
        return 8 * k + 2 * (self.lane % 4) + side

    def widen(self, register: cute.Tensor) -> cute.Tensor:
        """The four e4m3 values of a register in the compute type."""
        narrow = cute.recast_tensor(register, Float8E4M3FN)
        wide = cute.make_rmem_tensor(4, self.dtype)
        wide.store(narrow.load().to(Float32).to(self.dtype))
        return wide

    @cute.jit
    def scores(self, acc_S: cute.Tensor, tSrQ: cute.Tensor, sK: cute.Tensor):
        """acc_S = Q K^T for K (keys, d / 2)."""
        tiled_mma = self.tiled_mma()
        copy_K, tSsK, to_fill, tSrK = self.operand_b(sK, False)
        cute.copy(copy_K, tSsK, to_fill)
        acc_S.fill(0.0)
        tiles = cute.size(tSrK, mode=[1])
        for k in cutlass.range_constexpr(cute.size(tSrQ, mode=[2])):
            rK = cute.make_rmem_tensor(((2, 2), tiles), self.dtype)
            for n in cutlass.range_constexpr(tiles):
                wide = self.widen(tSrK[(None, k % 2), n, k // 2])
                for i in cutlass.range_constexpr(4):
                    rK[(i % 2, i // 2), n] = wide[i]
            cute.gemm(tiled_mma, acc_S, tSrQ[None, None, k], rK, acc_S)

    @cute.jit
    def accumulate(self, acc_O: cute.Tensor, acc_P: cute.Tensor, sVt: cute.Tensor):
        """acc_O += P V with V^T (d / 2, keys); even and odd columns of 16 in tiles of their own."""
        tiled_mma = self.tiled_mma()
        copy_V, tOsV, to_fill, tOrV = self.operand_b(sVt, True)
        rP = cute.make_fragment_like(acc_P, self.dtype)
        rP.store(acc_P.load().to(self.dtype))
        tOrP = as_operand_a(rP)
        cute.copy(copy_V, tOsV, to_fill)
        pairs_O = cute.logical_divide(acc_O, (None, None, 2))
        for k in cutlass.range_constexpr(cute.size(tOrP, mode=[2])):
            for n in cutlass.range_constexpr(cute.size(tOrV, mode=[1])):
                rV = cute.make_rmem_tensor(((2, 2), 2), self.dtype)
                for half in cutlass.range_constexpr(2):
                    wide = self.widen(tOrV[(None, half), n, k])
                    for i in cutlass.range_constexpr(4):
                        rV[(i // 2, half), i % 2] = wide[i]
                acc = pairs_O[None, None, (None, n)]
                cute.gemm(tiled_mma, acc, tOrP[None, None, k], rV, acc)
