"""Tile configurations: what a kernel needs to know beyond the problem, as data.

A `TileConfig` is one way to run the forward kernel of the mma.sync family. `FORWARD_ROWS` holds the
configurations that ship, and where and when each was measured. A head dimension that is no row's
own takes the narrowest row that holds it; the columns beyond it are zero and not stored.
"""

import math
from dataclasses import dataclass, replace

WARP_SIZE = 32
WARPS_PER_GROUP = 4
REGISTER_FILE = 65536  # 32-bit registers of one SM, on every card of the family
SMEM_LIMIT_SM120 = 101376  # bytes a CTA may opt in to on sm_120; kept by rows for every card
SMEM_LIMIT_SM90 = 232448
BARRIER_BYTES = 1024  # mbarriers, and what aligning the first tile to 1024 bytes may cost


@dataclass(frozen=True, slots=True)
class RegisterBudget:
    """Registers a thread of each role after `setmaxnreg`."""

    load: int
    compute: int

    @property
    def changes(self) -> set[tuple[str, int]]:
        """What `setmaxnreg` does."""
        return {("inc", self.compute), ("dec", self.load)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """One configuration of the mma.sync forward kernel.

    Tiles of Q and K have `head_dim` columns, those of V and O `head_dim_v`; tensors have at most
    as many. Each compute warp owns `rows_per_warp` query rows: two m16 tiles, so that one
    `ldmatrix.x4` of K or V feeds four `mma.sync`, or one where O would take too many registers.
    Blocks of `block_n` rows of K and of V take turns in a ring of `kv_stages` slots, all of K's
    width. Q stays in registers if `q_in_registers`, else `ldmatrix` brings it once a block.
    `stack_bytes` is the most that ptxas may spill a thread. K and V in pages arrive in boxes of
    `box_n` rows, None if they are not paged; a value of theirs has `kv_bytes` bytes, 1 being e4m3.
    `smem_limit` is what a CTA may take on the cards that the row is for.
    """

    head_dim: int
    head_dim_v: int
    block_n: int
    kv_stages: int
    num_compute_warps: int = 8
    rows_per_warp: int = 32
    q_in_registers: bool = False
    registers: RegisterBudget = RegisterBudget(load=24, compute=240)
    stack_bytes: int = 0
    box_n: int | None = None
    smem_limit: int = SMEM_LIMIT_SM120
    kv_bytes: int = 2

    @property
    def family(self) -> str:
        """The kernels that these tiles are for."""
        return "sm120"

    @property
    def is_general(self) -> bool:
        """Whether the kernel also packs heads."""
        return False

    @property
    def counts_tiles(self) -> bool:
        """Whether CTAs take tiles from a counter where sequences differ."""
        return False

    @property
    def block_m(self) -> int:
        return self.num_compute_warps * self.rows_per_warp

    @property
    def num_threads(self) -> int:
        return (self.num_compute_warps + WARPS_PER_GROUP) * WARP_SIZE

    @property
    def load_warp(self) -> int:
        return self.num_compute_warps

    @property
    def swizzle_elements(self) -> int:
        """Columns of one swizzle atom of Q in shared memory."""
        return _widest_atom(self.head_dim, self.head_dim_v)

    @property
    def kv_columns(self) -> int:
        """16-bit elements of a row of K in shared memory: two values of e4m3 are one."""
        return self.head_dim * self.kv_bytes // 2

    @property
    def kv_columns_v(self) -> int:
        """16-bit elements of a row of V."""
        return self.head_dim_v * self.kv_bytes // 2

    @property
    def kv_swizzle_elements(self) -> int:
        """16-bit elements of one swizzle atom of K and V in shared memory."""
        return _widest_atom(self.kv_columns, self.kv_columns_v)

    def holds(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether tensors of these head dimensions fit into the tiles."""
        return head_dim <= self.head_dim and head_dim_v <= self.head_dim_v

    def paged(self, page_size: int) -> "TileConfig | None":
        """The same for pages of so many keys, or None: boxes begin at multiples of 128 bytes."""
        box_n = math.gcd(page_size, self.block_n)
        fits = 2 * box_n * self.kv_swizzle_elements % 128 == 0
        return replace(self, box_n=box_n) if fits else None

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA: the Q tile, the ring of K and V blocks, the barriers."""
        ring = 2 * self.kv_columns * self.kv_stages * self.block_n
        return 2 * self.head_dim * self.block_m + ring + BARRIER_BYTES

    def explain(self) -> str:
        """What the tiles are, for people."""
        kind = "keys of e4m3" if self.kv_bytes == 1 else "keys"
        pages = f" in boxes of {self.box_n}" if self.box_n else ""
        return (
            f"{self.block_m} queries x {self.block_n} {kind}{pages}, {self.kv_stages} K/V slots, "
            f"{self.num_compute_warps} compute warps, {self.smem_bytes} bytes of shared memory"
        )

    def check(self) -> None:
        """Assert what the kernel takes for granted; a row that fails is our bug."""
        assert self.head_dim % 16 == 0 and self.block_n % 16 == 0
        if self.kv_bytes == 1:
            assert self.block_n % 32 == 0, "an `ldmatrix.x4` brings 16 columns of 32 keys of K"
            assert self.head_dim % 32 == 0, "one of V brings 32 columns of 16 keys"
        assert self.head_dim_v % 32 == 0, "the epilogue transposes four n8 tiles at a time"
        assert self.head_dim_v <= self.head_dim, "V takes slots of K's width"
        assert self.rows_per_warp in (16, 32)
        assert self.kv_stages >= 2, "K and V of one block are in flight together"
        assert self.block_n % (self.box_n or self.block_n) == 0, "a block is boxes"
        assert self.num_compute_warps % WARPS_PER_GROUP == 0
        assert self.smem_bytes <= self.smem_limit, f"{self} needs {self.smem_bytes} bytes"
        groups = self.num_compute_warps // WARPS_PER_GROUP
        per_lane = groups * self.registers.compute + self.registers.load
        assert per_lane * WARPS_PER_GROUP * WARP_SIZE <= REGISTER_FILE, (
            f"{self} overdraws registers"
        )


def _widest_atom(*columns: int) -> int:
    """Columns of the widest swizzle atom of 16-bit elements, 64, 32 or 16, that divides all."""
    return next(n for n in (64, 32, 16) if all(c % n == 0 for c in columns))


# One row serves every card of the family until a card is measured to want its own.
# Measured on an H200 as sm_90a, 2026-11-21, bf16, TFLOP/s dense / causal, at b1 s8192 h32/8 (d 96
# and 128) and b2 s8192 h32 (d 64); not yet run on sm_120 or sm_121 hardware.
# d 32 and those with 16 rows a warp are not timed yet.
FORWARD_ROWS: tuple[TileConfig, ...] = (
    TileConfig(head_dim=32, head_dim_v=32, block_n=96, kv_stages=6),
    # 358 / 357; block_n 64, 6 slots: 345 / 342; 12 compute warps of 160 registers lost 4 %
    # ptxas spills up to 80 bytes for sm_120a and sm_121a, none with block_n 64: 13 loads of what
    # was computed before the loop, a key block; not timed there.
    TileConfig(head_dim=64, head_dim_v=64, block_n=96, kv_stages=5, stack_bytes=80),
    # 416 dense; block_n 64, 4 slots: 393; block_n 48, 5 slots: 397
    # ptxas spills up to 80 bytes, outside the key loop.
    TileConfig(head_dim=96, head_dim_v=96, block_n=80, kv_stages=2, stack_bytes=80),
    # 432 / 416; block_n 48 lost 5 %, block_n 32 with 4 slots 14 %
    # ptxas 12.9 spills up to 152 bytes for sm_120a and sm_121a, where it renames the accumulators:
    # registers of O wait in local memory from one P V to the next, 26 loads and 26 stores a key
    # block, or 3 % of the loop's 1813 instructions. By the rates of these cards the tensor core
    # hides them; not timed there. ptxas 13.3 spills 64 bytes.
    TileConfig(head_dim=128, head_dim_v=128, block_n=64, kv_stages=2, stack_bytes=152),
    # Multi-head latent attention, as prefill runs it. ptxas spills up to 24 bytes for d 192, not in
    # the key loop.
    TileConfig(
        head_dim=192,
        head_dim_v=128,
        block_n=64,
        kv_stages=2,
        rows_per_warp=16,
        q_in_registers=True,
        stack_bytes=24,
    ),
    TileConfig(
        head_dim=192,
        head_dim_v=192,
        block_n=64,
        kv_stages=2,
        rows_per_warp=16,
        q_in_registers=True,
        stack_bytes=24,
    ),
    # ptxas 12.9 spills up to 120 bytes for sm_120a and sm_121a, none for sm_90a: O again, 48 of the
    # key loop's 879 instructions; not timed there. ptxas 13.3 spills none.
    TileConfig(
        head_dim=256,
        head_dim_v=256,
        block_n=32,
        kv_stages=2,
        rows_per_warp=16,
        q_in_registers=True,
        stack_bytes=120,
    ),
)

# K and V of e4m3: slots of half the bytes, and registers in which they are widened. Chosen by what
# ptxas spills, see docs/design.md; not timed yet.
FP8_ROWS: tuple[TileConfig, ...] = (
    TileConfig(head_dim=64, head_dim_v=64, block_n=96, kv_stages=8, kv_bytes=1),
    TileConfig(head_dim=96, head_dim_v=96, block_n=64, kv_stages=8, kv_bytes=1),
    # ptxas spills up to 248 bytes for sm_120a and sm_121a, 24 for sm_90a, 184 for sm_103a: of O, as
    # above, 48 LDL.64 and 29 STL.64 among the 2374 instructions of a key block.
    TileConfig(head_dim=128, head_dim_v=128, block_n=64, kv_stages=4, kv_bytes=1, stack_bytes=248),
    TileConfig(
        head_dim=192,
        head_dim_v=128,
        block_n=64,
        kv_stages=4,
        rows_per_warp=16,
        q_in_registers=True,
        kv_bytes=1,
    ),
    TileConfig(
        head_dim=256,
        head_dim_v=256,
        block_n=32,
        kv_stages=4,
        rows_per_warp=16,
        q_in_registers=True,
        kv_bytes=1,
    ),
)

# What an H200 wants otherwise, for it has more than twice the shared memory: rings of four slots.
# Measured there 2026-11-29, TFLOP/s dense / causal, ptxas 13.4, against two slots in the same run:
# d 128 452 / 437 to 452 instead of 436 / 433, at b8 s1024 406 / 330 instead of 390 / 313; d 256
# 390 / 342 instead of 356 / 335. d 64 (8 slots) and d 96 (4) gain nothing.
ROWS_OF_VARIANT: dict[str, tuple[TileConfig, ...]] = {
    "sm90a": tuple(
        replace(row, kv_stages=4, smem_limit=SMEM_LIMIT_SM90) if row.head_dim in (128, 256) else row
        for row in FORWARD_ROWS
    ),
}
