"""The products of the forward kernel over an fp8 cache: e4m3 becomes 16 bits in registers.

As in `decode_fp8`, K and V are rows of d / 2 elements of 16 bits to shared memory and `ldmatrix`,
and the order of columns is what falls out. Of K a register holds four neighbouring columns of one
key, both registers of a B operand once they are widened, so Q is put into that order when it has
arrived (`QueryRows.interleave`). Of V^T it holds two neighbouring columns of two keys, of which the
even ones go to one n8 tile and the odd ones to the next: a lane ends up with four neighbouring
columns of O, which it stores as they are.

K is widened to Q's type. P and V are multiplied in float16, which holds every e4m3 and three bits
more of P than bfloat16, and which one instruction makes of two values instead of four. P is below
2^8 (see common.softmax); what is below 2^-24 of it is lost, beside a largest one of 1 or more.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float8E4M3FN, Float16, Float32, Int32
from cutlass.cute.nvgpu import warp

from ..common.dropout import Dropout
from ..common.fragments import as_operand_a
from ..common.softmax import OnlineSoftmax
from .compute import WarpMma
from .epilogue import QUAD, Epilogue
from .query import CHUNK, QueryRows, as_vector

KEYS = 32  # of one `ldmatrix.x4` of K, 16 bytes each
TILES = KEYS // 8
BYTES_BY_COLUMN = 0x3120  # prmt: the bytes 0, 2, 1, 3


@dataclass(frozen=True)
class Fp8Epilogue(Epilogue):
    """Stores rows of which a lane holds four neighbouring columns in every two n8 tiles."""

    @cute.jit
    def _store_rows(self, mO: cute.Tensor, row: Int32, num_rows: Int32, acc_O: cute.Tensor):
        """Copy the rows and columns that exist to rows `row`, `row` + 1, ... of mO (rows, d_v)."""
        num_columns = cute.size(mO, mode=[1]) // QUAD
        for m in cutlass.range_constexpr(cute.size(acc_O, mode=[1])):
            for half in cutlass.range_constexpr(2):
                local = self.lane // QUAD + 8 * half + 16 * m
                if local < num_rows:
                    gO = mO[row + local, None]
                    for n in cutlass.range_constexpr(0, cute.size(acc_O, mode=[2]), 2):
                        column = self.lane % QUAD + QUAD * (n // 2)
                        if column < num_columns:
                            own = cute.make_rmem_tensor(QUAD, Float32)
                            for i in cutlass.range_constexpr(QUAD):
                                own[i] = acc_O[(i // 2, half), m, n + i % 2]
                            out = cute.make_fragment_like(own, mO.element_type)
                            out.store(own.load().to(mO.element_type))
                            cute.autovec_copy(out, cute.local_tile(gO, (QUAD,), (column,)))

    @cute.jit
    def _store_partial_rows(self, mO: cute.Tensor, row: Int32, num_rows: Int32, acc_O: cute.Tensor):
        """The same in float32."""
        self._store_rows(mO, row, num_rows, acc_O)


@dataclass(frozen=True)
class Fp8WarpMma(WarpMma):
    """WarpMma for K and V of fp8, given as (keys, d / 2) elements of 16 bits."""

    epilogue = Fp8Epilogue

    @cute.jit
    def prepare(self, queries: QueryRows):
        """Bring the rows that have been fetched into the order of K's columns."""
        queries.interleave(self.lane)

    @cute.jit
    def hold_queries(self, tSrQ: cute.Tensor, sQ: cute.Tensor, has_keys: Boolean):
        """Bring all of Q into its registers: a warp without keys has fetched rows too."""
        for k in cutlass.range_constexpr(cute.size(tSrQ, mode=[2])):
            self.load_queries(tSrQ, sQ, k)

    def widened(self, register: cute.Tensor, dtype: type[cutlass.Numeric]) -> cute.Tensor:
        """The four e4m3 values of a register as numbers of 16 bits."""
        narrow = cute.recast_tensor(register, Float8E4M3FN).load()
        wide = cute.make_rmem_tensor(4, dtype)
        # Two conversions to float16; to bfloat16 there is none, and float32 is on the way.
        exact = narrow if dtype is Float16 else narrow.to(Float32)
        wide.store(exact.to(dtype))
        return wide

    @cute.jit
    def load_keys(self, raw: cute.Tensor, sK: cute.Tensor, at: Constexpr[tuple]):
        """Bring k16 step `at`[0] of the keys of group `at`[1] into `raw` (2, n8 tiles)."""
        step, group = at
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, TILES), self.dtype)
        own = cute.local_tile(sK, (KEYS, CHUNK), (group, step))
        source = as_vector(cute.local_tile(own, (1, CHUNK), (self.lane, 0)))
        cute.copy(atom, source, cute.make_tensor(raw.iterator, cute.make_layout(CHUNK)))

    @cute.jit
    def scores(self, acc_S: cute.Tensor, tSrQ: cute.Tensor, sQ: cute.Tensor, sK: cute.Tensor):
        """acc_S = Q K^T, Q (rows, d) and K (block_n, d / 2)."""
        tiled_mma = self.tiled_mma()
        groups_S = cute.logical_divide(acc_S, (None, None, TILES))
        num_groups, num_steps = self.cfg.block_n // KEYS, cute.size(tSrQ, mode=[2])
        raw = cute.make_rmem_tensor((2, TILES, num_groups, num_steps), self.dtype)
        acc_S.fill(0.0)
        fetch_Q = not self.cfg.q_in_registers
        if cutlass.const_expr(fetch_Q):
            self.load_queries(tSrQ, sQ, 0)
        self.load_keys(raw[None, None, 0, 0], sK, (0, 0))
        for unit in cutlass.range_constexpr(num_groups * num_steps):
            k, j = unit // num_groups, unit % num_groups
            next_k, next_j = (unit + 1) // num_groups, (unit + 1) % num_groups
            if cutlass.const_expr(next_k < num_steps):
                if cutlass.const_expr(next_j == 0 and fetch_Q):
                    self.load_queries(tSrQ, sQ, next_k)
                self.load_keys(raw[None, None, next_j, next_k], sK, (next_k, next_j))
            rK = cute.make_rmem_tensor(((2, 2), TILES), self.dtype)
            for n in cutlass.range_constexpr(TILES):
                wide = self.widened(raw[None, n, j, k], self.dtype)
                for i in cutlass.range_constexpr(4):
                    rK[(i % 2, i // 2), n] = wide[i]
            acc = groups_S[None, None, (None, j)]
            cute.gemm(tiled_mma, acc, tSrQ[None, None, k], rK, acc)

    @cute.jit
    def accumulate(
        self,
        acc_O: cute.Tensor,
        acc_S: cute.Tensor,
        softmax: OnlineSoftmax,
        sVt: cute.Tensor,
        dropout: Dropout,
        corner: tuple,
    ):
        """acc_O += P V as WarpMma's, V^T (d_v / 2, block_n); even and odd columns are tiles."""
        half = WarpMma(self.cfg, Float16, self.lane)
        thr_mma = self.tiled_mma().get_slice(self.lane)
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), self.dtype)
        copy_V = cute.make_tiled_copy_B(atom, self.tiled_mma())
        tOsV = copy_V.get_slice(self.lane).partition_S(sVt)
        tOrV = thr_mma.make_fragment_B(thr_mma.partition_B(sVt))
        rV = copy_V.retile(tOrV)
        pairs_V = cute.logical_divide(tOrV, (None, 2, None))
        # One `ldmatrix.x4` brings 32 columns: an even and an odd tile of each 16.
        groups_O = cute.logical_divide(acc_O, (None, None, 4))
        rP = cute.make_fragment_like(acc_S, Float16)
        steps_P = cute.logical_divide(rP, (None, None, 2))
        num_pairs, num_steps = cute.size(rV, mode=[1]), cute.size(tOrV, mode=[2])
        # The m16n8 tiles of one k16 step of P.
        tiles = [(m, n) for n in range(2) for m in range(cute.size(acc_S, mode=[1]))]
        cute.copy(copy_V, tOsV[None, 0, 0], rV[None, 0, 0])
        for m, n in tiles:
            half.probabilities(rP, acc_S, (m, n), softmax, dropout, corner)
        for k in cutlass.range_constexpr(num_steps):
            tOrP = as_operand_a(steps_P[None, None, (None, k)])[None, None, 0]
            for j in cutlass.range_constexpr(num_pairs):
                if cutlass.const_expr(k * num_pairs + j + 1 < num_steps * num_pairs):
                    next_k, next_j = (k, j + 1) if j + 1 < num_pairs else (k + 1, 0)
                    cute.copy(copy_V, tOsV[None, next_j, next_k], rV[None, next_j, next_k])
                acc = groups_O[None, None, (None, j)]
                wide = self.columns(pairs_V[None, (None, j), k])
                cute.gemm(half.tiled_mma(), acc, tOrP, wide, acc)
                for i in cutlass.range_constexpr(len(tiles)):
                    if cutlass.const_expr(k + 1 < num_steps and i * num_pairs // len(tiles) == j):
                        at = (tiles[i][0], tiles[i][1] + 2 * (k + 1))
                        half.probabilities(rP, acc_S, at, softmax, dropout, corner)

    @cute.jit
    def columns(self, raw: cute.Tensor) -> cute.Tensor:
        """The B operands of four n8 tiles of V^T, from ((2, 2), 2) elements of two values."""
        wide = cute.make_rmem_tensor(((2, 2), 4), Float16)
        for n in cutlass.range_constexpr(2):
            for side in cutlass.range_constexpr(2):
                word = cute.make_rmem_tensor(2, self.dtype)
                word.store(raw[(None, side), n].load())
                bits = cute.recast_tensor(word, Int32)
                bits[0] = Int32(cute.arch.prmt(bits[0], bits[0], BYTES_BY_COLUMN))
                pairs = self.widened(word, Float16)
                for i in cutlass.range_constexpr(4):
                    wide[(i % 2, side), 2 * n + i // 2] = pairs[i]
        return wide
