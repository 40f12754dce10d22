"""The two matrix products of one warp, by `mma.sync.m16n8k16` with operands from `ldmatrix`."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from ..common.dropout import Dropout
from ..common.fragments import as_operand_a, rows_and_columns, tile_of
from ..common.softmax import OnlineSoftmax
from .epilogue import Epilogue
from .query import QueryRows


@dataclass(frozen=True)
class MmaSync:
    """`mma.sync` of one warp, 16 x 16 outputs at a time; `cfg` is the kernel's configuration."""

    cfg: Constexpr[Any]
    dtype: Constexpr[type[cutlass.Numeric]]
    lane: Int32

    def tiled_mma(self) -> cute.TiledMma:
        op = warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16))
        return cute.make_tiled_mma(op, (1, 1, 1), permutation_mnk=(16, 16, 16))

    def operand_b(self, sB: cute.Tensor, transposed: bool):
        """(copy, source, its registers, the same as the product takes them) of B (n, k) in shared
        memory, brought by `ldmatrix.x4` from rows of k or, `transposed`, of n."""
        tiled_mma = self.tiled_mma()
        thr_mma = tiled_mma.get_slice(self.lane)
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transposed, 4), self.dtype)
        copy_B = cute.make_tiled_copy_B(atom, tiled_mma)
        tXsB = copy_B.get_slice(self.lane).partition_S(sB)
        tXrB = thr_mma.make_fragment_B(thr_mma.partition_B(sB))
        return copy_B, tXsB, copy_B.retile(tXrB), tXrB


@dataclass(frozen=True)
class WarpMma(MmaSync):
    """The products of the forward kernel, whose operands are fetched just in time.

    What concerns the type of K and V are methods: `forward_fp8` has others.
    """

    epilogue = Epilogue  # what stores O in the order of columns that falls out
    tiles = 2  # n8 tiles of a product of which one `ldmatrix.x4` brings the operand B

    @property
    def p_dtype(self) -> type[cutlass.Numeric]:
        """What P and V are multiplied in."""
        return self.dtype

    def prepare(self, queries: QueryRows):
        """Bring the rows that have been fetched into the order of K's columns: they are."""

    def keys(self, sK: cute.Tensor):
        """K (block_n, d) and the registers it comes to, for the two methods that follow."""
        copy_K, tSsK, rK, tSrK = self.operand_b(sK, False)
        return copy_K, tSsK, rK, cute.logical_divide(tSrK, (None, self.tiles, None))

    def load_keys(self, keys: tuple, j: int, k: int):
        """Bring k16 step k of the j-th group of tiles."""
        copy_K, tSsK, rK, _ = keys
        cute.copy(copy_K, tSsK[None, j, k], rK[None, j, k])

    def key_operand(self, keys: tuple, j: int, k: int) -> cute.Tensor:
        """What `load_keys` has brought, as the product takes it."""
        return keys[3][None, (None, j), k]

    def value_operand(self, raw: cute.Tensor) -> cute.Tensor:
        """What an `ldmatrix.x4` has brought of V^T, as the product takes it."""
        return raw

    def accumulator(self, columns: int) -> cute.Tensor:
        shape = self.tiled_mma().partition_shape_C((self.cfg.rows_per_warp, columns))
        return cute.make_rmem_tensor(shape, Float32)

    def score_coordinates(self, lane: Int32) -> cute.Tensor:
        """(row, column) inside the block of every score that the lane holds, as (rows, columns)."""
        cS = cute.make_identity_tensor((self.cfg.rows_per_warp, self.cfg.block_n))
        return rows_and_columns(self.tiled_mma().get_slice(lane).partition_C(cS))

    def query_fragment(self, sQ: cute.Tensor) -> cute.Tensor:
        """Registers for the A operand Q (rows, d), all k16 steps of it."""
        thr_mma = self.tiled_mma().get_slice(self.lane)
        return thr_mma.make_fragment_A(thr_mma.partition_A(sQ))

    @cute.jit
    def load_queries(self, tSrQ: cute.Tensor, sQ: cute.Tensor, step: Constexpr[int]):
        """Bring one k16 step of Q into its registers."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
        copy_Q = cute.make_tiled_copy_A(atom, self.tiled_mma())
        tSsQ = copy_Q.get_slice(self.lane).partition_S(sQ)
        rQ = copy_Q.retile(tSrQ)
        cute.copy(copy_Q, tSsQ[None, None, step], rQ[None, None, step])

    @cute.jit
    def hold_queries(self, tSrQ: cute.Tensor, sQ: cute.Tensor, has_keys: Boolean):
        """Bring all of Q into its registers, if the warp has any keys."""
        if has_keys:
            for k in cutlass.range_constexpr(cute.size(tSrQ, mode=[2])):
                self.load_queries(tSrQ, sQ, k)

    @cute.jit
    def scores(self, acc_S: cute.Tensor, tSrQ: cute.Tensor, sQ: cute.Tensor, sK: cute.Tensor):
        """acc_S = Q K^T, Q (rows, d) and K (block_n, d) both with d contiguous."""
        tiled_mma = self.tiled_mma()
        keys = self.keys(sK)
        # One ldmatrix.x4 brings a group of n8 tiles of K. Each is issued one product ahead of its
        # use, or the tensor core would wait for it every time.
        groups_S = cute.logical_divide(acc_S, (None, None, self.tiles))
        acc_S.fill(0.0)
        fetch_Q = not self.cfg.q_in_registers
        num_groups, num_steps = self.cfg.block_n // (8 * self.tiles), cute.size(tSrQ, mode=[2])
        if const_expr(fetch_Q):
            self.load_queries(tSrQ, sQ, 0)
        self.load_keys(keys, 0, 0)
        for unit in cutlass.range_constexpr(num_groups * num_steps):
            k, j = unit // num_groups, unit % num_groups
            next_k, next_j = (unit + 1) // num_groups, (unit + 1) % num_groups
            if const_expr(next_k < num_steps):
                if const_expr(next_j == 0 and fetch_Q):
                    self.load_queries(tSrQ, sQ, next_k)
                self.load_keys(keys, next_j, next_k)
            acc = groups_S[None, None, (None, j)]
            cute.gemm(tiled_mma, acc, tSrQ[None, None, k], self.key_operand(keys, j, k), acc)

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
        """acc_O += P V, P = exponentials of acc_S, V^T (d_v, block_n) read by `ldmatrix.trans`.

        `corner` is the (row, key) of P's first element, for dropout. The exponentials of one k16
        step are issued among the products of the step before it, a tile at a time, so that the two
        units work at the same time.
        """
        copy_V, tOsV, rV, tOrV = self.operand_b(sVt, True)
        tiled_mma = MmaSync(self.cfg, self.p_dtype, self.lane).tiled_mma()
        pairs_V = cute.logical_divide(tOrV, (None, 2, None))
        groups_O = cute.logical_divide(acc_O, (None, None, self.tiles))
        rP = cute.make_fragment_like(acc_S, self.p_dtype)
        steps_P = cute.logical_divide(rP, (None, None, 2))
        num_pairs, num_steps = cute.size(rV, mode=[1]), cute.size(tOrV, mode=[2])
        # The m16n8 tiles of one k16 step of P.
        tiles = [(m, n) for n in range(2) for m in range(cute.size(acc_S, mode=[1]))]
        cute.copy(copy_V, tOsV[None, 0, 0], rV[None, 0, 0])
        for m, n in tiles:
            self.probabilities(rP, acc_S, (m, n), softmax, dropout, corner)
        for k in cutlass.range_constexpr(num_steps):
            tOrP = as_operand_a(steps_P[None, None, (None, k)])[None, None, 0]
            for j in cutlass.range_constexpr(num_pairs):
                if const_expr(k * num_pairs + j + 1 < num_steps * num_pairs):
                    next_k, next_j = (k, j + 1) if j + 1 < num_pairs else (k + 1, 0)
                    cute.copy(copy_V, tOsV[None, next_j, next_k], rV[None, next_j, next_k])
                acc = groups_O[None, None, (None, j)]
                operand = self.value_operand(pairs_V[None, (None, j), k])
                cute.gemm(tiled_mma, acc, tOrP, operand, acc)
                for i in cutlass.range_constexpr(len(tiles)):
                    if const_expr(k + 1 < num_steps and i * num_pairs // len(tiles) == j):
                        at = (tiles[i][0], tiles[i][1] + 2 * (k + 1))
                        self.probabilities(rP, acc_S, at, softmax, dropout, corner)

    @cute.jit
    def probabilities(
        self,
        rP: cute.Tensor,
        acc_S: cute.Tensor,
        at: tuple,
        softmax: OnlineSoftmax,
        dropout: Dropout,
        corner: tuple,
    ):
        """P of one m16n8 tile, the one `at` (m, n)."""
        m, n = at
        tile_S = tile_of(acc_S, m, n)
        softmax.exponentials(rows_and_columns(tile_S), 2 * m)
        if const_expr(dropout.present):
            dropout.apply(rows_and_columns(tile_S), corner[0] + 16 * m, corner[1] + 8 * n)
        tile_of(rP, m, n).store(tile_S.load().to(self.p_dtype))
