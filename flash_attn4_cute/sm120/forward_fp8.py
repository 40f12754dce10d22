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
from cutlass import Boolean, Float8E4M3FN, Float16, Float32, Int32
from cutlass.cute.nvgpu import warp

from .epilogue import QUAD, Epilogue
from .products import WarpMma
from .query import CHUNK, QueryRows, as_vector

KEYS = 32  # of one `ldmatrix.x4` of K, 16 bytes each
STEP = 16  # columns of one step of a product
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
    tiles = KEYS // 8

    @property
    def p_dtype(self) -> type[cutlass.Numeric]:
        """What P and V are multiplied in."""
        return Float16

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

    def keys(self, sK: cute.Tensor):
        """K (block_n, d / 2) and the registers it comes to, (2, n8 tiles, groups, steps)."""
        shape = (2, self.tiles, self.cfg.block_n // KEYS, self.cfg.head_dim // STEP)
        return sK, cute.make_rmem_tensor(shape, self.dtype)

    def load_keys(self, keys: tuple, j: int, k: int):
        """Bring k16 step k, which is 16 bytes of a key, of the j-th group of keys."""
        sK, raw = keys
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, self.tiles), self.dtype)
        group = cute.local_tile(sK, (KEYS, CHUNK), (j, k))
        source = as_vector(cute.local_tile(group, (1, CHUNK), (self.lane, 0)))
        target = cute.make_tensor(raw[None, None, j, k].iterator, cute.make_layout(CHUNK))
        cute.copy(atom, source, target)

    def key_operand(self, keys: tuple, j: int, k: int) -> cute.Tensor:
        """What `load_keys` has brought, widened: a register is both of an n8 tile's."""
        _, raw = keys
        rK = cute.make_rmem_tensor(((2, 2), self.tiles), self.dtype)
        for n in range(self.tiles):
            wide = self.widened(raw[None, n, j, k], self.dtype)
            for i in range(4):
                rK[(i % 2, i // 2), n] = wide[i]
        return rK

    def value_operand(self, raw: cute.Tensor) -> cute.Tensor:
        """What an `ldmatrix.x4` has brought of V^T, widened: an even and an odd tile of each 16."""
        wide = cute.make_rmem_tensor(((2, 2), 4), Float16)
        for n in range(2):
            for side in range(2):
                word = cute.make_rmem_tensor(2, self.dtype)
                word.store(raw[(None, side), n].load())
                bits = cute.recast_tensor(word, Int32)
                bits[0] = Int32(cute.arch.prmt(bits[0], bits[0], BYTES_BY_COLUMN))
                pairs = self.widened(word, Float16)
                for i in range(4):
                    wide[(i % 2, side), 2 * n + i // 2] = pairs[i]
        return wide
