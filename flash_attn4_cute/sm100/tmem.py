"""The map of tensor memory, and how a thread reads and writes its own row of it.

    columns            0         128       256           256 + d_v      256 + 2 d_v
    two Q tiles        |  S0/P0  |  S1/P1  |     O0      |      O1      |
    two, P apart       |   S0    |   S1    |     O0      |      O1      |  P0  |  P1  |
    one, d_v <= 256    |  S0/P0  |  S1/P1  |     O       |
    lanes              row i of a 128-row tile lives in lane i

Two Q tiles have a slot for S each; one has two, for its even and its odd key blocks. In a pair of
CTAs, each has such a map for its own rows.

P, 16 bits an element, takes half as many columns as S. As a rule they are the first of the S that
it comes from: a softmax thread holds its whole row of S in registers before it writes P, and the
next Q K^T into these columns is issued behind the P V that reads them. Where O leaves room, up to
d_v 64, P has columns of its own (`TileConfig.p_apart`), and the next Q K^T follows as soon as S is
in registers.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import dsl_user_op

from .tiles import BLOCK_M, BLOCK_N, ELEMENT_BYTES, SCORE_SLOTS, TMEM_COLUMNS, TileConfig

LANE = 1 << 16  # of an address: the lane above the column
COLUMN_BYTES = 4  # of a lane
P_COLUMNS = BLOCK_N * ELEMENT_BYTES // COLUMN_BYTES


@dataclass(frozen=True)
class TmemMap:
    """First columns of S and P by slot, of O by Q tile; a column is 32 bits a lane."""

    s: tuple[int, ...]
    p: tuple[int, ...]
    o: tuple[int, ...]
    end: int

    @staticmethod
    def of(cfg: TileConfig) -> "TmemMap":
        s = tuple(i * BLOCK_N for i in range(SCORE_SLOTS))
        end_s = SCORE_SLOTS * BLOCK_N
        o = tuple(end_s + i * cfg.head_dim_v for i in range(cfg.q_tiles))
        p, end = s, o[-1] + cfg.head_dim_v
        if cfg.p_apart:
            p = tuple(end + i * P_COLUMNS for i in range(SCORE_SLOTS))
            end = p[-1] + P_COLUMNS
        found = TmemMap(s, p, o, end)
        assert found.end <= TMEM_COLUMNS, f"{found} does not fit {TMEM_COLUMNS} columns"
        return found

    def s_at(self, slot: Int32) -> Int32:
        """First column of S of a slot that is known at run time."""
        return self.s[0] + slot * (self.s[1] - self.s[0])

    def p_at(self, slot: Int32) -> Int32:
        """First column of P of a slot that is known at run time."""
        return self.p[0] + slot * (self.p[1] - self.p[0])


@dataclass(frozen=True)
class TmemRow:
    """Columns [first, first + columns) of the lane that belongs to thread `thread` of 128."""

    first: Int32
    columns: Constexpr[int]
    thread: Int32

    def load(self, registers: cute.Tensor, width: int):
        """Read the columns, `width` an instruction; not there before `wait_loads`."""
        copy, tmem = self._tiled_copy(tcgen05.Ld32x32bOp(tcgen05.Repetition(width)))
        source = copy.get_slice(self.thread).partition_S(tmem)
        cute.copy(copy, source, self._registers(registers, width))

    def load_with_max(self, registers: cute.Tensor, width: int) -> cute.Tensor:
        """As `load`; returns the greatest value of each instruction. sm_103 has it, sm_100 not."""
        copy, tmem = self._tiled_copy(tcgen05.LdRed32x32bOp(tcgen05.Repetition(width)))
        source = copy.get_slice(self.thread).partition_S(tmem)
        largest = cute.make_rmem_tensor(((1, 1), 1, self.columns // width), Float32)
        cute.copy(copy, source, (self._registers(registers, width), largest))
        return cute.make_tensor(largest.iterator, cute.make_layout(self.columns // width))

    def store(self, registers: cute.Tensor, width: int):
        """Write the columns, `width` an instruction; not there before `wait_stores`."""
        copy, tmem = self._tiled_copy(tcgen05.St32x32bOp(tcgen05.Repetition(width)))
        target = copy.get_slice(self.thread).partition_D(tmem)
        cute.copy(copy, self._registers(registers, width), target)

    def _tiled_copy(self, op):
        pointer = cute.make_ptr(Float32, self.first, cute.AddressSpace.tmem, assumed_align=16)
        tmem = cute.make_tensor(
            pointer, cute.make_layout((BLOCK_M, self.columns), stride=(LANE, 1))
        )
        return tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), tmem), tmem

    def _registers(self, registers: cute.Tensor, width: int) -> cute.Tensor:
        """`columns` consecutive registers, as a copy takes them: (one instruction, 1, how many)."""
        layout = cute.make_layout(((width, 1), 1, self.columns // width), stride=((1, 0), 0, width))
        return cute.make_tensor(registers.iterator, layout)


def wait_loads():
    """Wait for this thread's tcgen05.ld."""
    cute.arch.fence_view_async_tmem_load()


def wait_stores():
    """Wait for this thread's tcgen05.st."""
    cute.arch.fence_view_async_tmem_store()


@dsl_user_op
def fence_before_sync(*, loc=None, ip=None):
    """Order this thread's tensor-memory accesses before the arrival that follows."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def fence_after_sync(*, loc=None, ip=None):
    """Order this thread's tensor-memory accesses after the wait that precedes."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC, loc=loc, ip=ip)
