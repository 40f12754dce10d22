"""Tile configurations: what a kernel needs to know beyond the problem, as data.

A `TileConfig` is one way to run the forward kernel of the mma.sync family. `FORWARD_ROWS` holds the
configurations that ship, a row per head dimension, and where and when each was measured.
"""

from dataclasses import dataclass

WARP_SIZE = 32
WARPS_PER_GROUP = 4
REGISTER_FILE = 65536  # 32-bit registers of one SM, on every card of the family
SMEM_LIMIT_SM120 = 101376  # bytes a CTA may opt in to on sm_120; kept on every card of the family
BARRIER_BYTES = 1024  # mbarriers, and what aligning the first tile to 1024 bytes may cost


@dataclass(frozen=True, slots=True)
class RegisterBudget:
    """Registers a thread of each role after `setmaxnreg`."""

    load: int
    compute: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """One configuration of the mma.sync forward kernel.

    Each compute warp owns `rows_per_warp` query rows: two m16 tiles, so that one `ldmatrix.x4` of
    K or V feeds four `mma.sync`. Blocks of `block_n` rows of K and of V take turns in a ring of
    `kv_stages` slots. `stack_bytes` is the most that ptxas may spill a thread.
    """

    head_dim: int
    block_n: int
    kv_stages: int
    num_compute_warps: int = 8
    rows_per_warp: int = 32
    registers: RegisterBudget = RegisterBudget(load=24, compute=240)
    stack_bytes: int = 0

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
        """Columns of one swizzle atom of a 16-bit type: the widest of 64, 32, 16 that divides d."""
        return next(n for n in (64, 32, 16) if self.head_dim % n == 0)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA: the Q tile, the ring of K and V blocks, the barriers."""
        row = 2 * self.head_dim
        return row * (self.block_m + self.kv_stages * self.block_n) + BARRIER_BYTES

    def check(self) -> None:
        """Assert what the kernel takes for granted; a row that fails is our bug."""
        assert self.head_dim % 16 == 0 and self.block_n % 16 == 0 and self.rows_per_warp == 32
        assert self.kv_stages >= 2, "K and V of one block are in flight together"
        assert self.num_compute_warps % WARPS_PER_GROUP == 0
        assert self.smem_bytes <= SMEM_LIMIT_SM120, f"{self} needs {self.smem_bytes} bytes"
        groups = self.num_compute_warps // WARPS_PER_GROUP
        per_lane = groups * self.registers.compute + self.registers.load
        assert per_lane * WARPS_PER_GROUP * WARP_SIZE <= REGISTER_FILE, (
            f"{self} overdraws registers"
        )


# One row serves every card of the family until a card is measured to want its own.
# Measured on an H200 as sm_90a, 2026-11-21, bf16, TFLOP/s dense / causal, at b1 s8192 h32/8 (d 96
# and 128) and b2 s8192 h32 (d 64); not yet run on sm_120 or sm_121 hardware.
FORWARD_ROWS: dict[int, TileConfig] = {
    # 358 / 357; block_n 64, 6 slots: 345 / 342; 12 compute warps of 160 registers lost 4 %
    # ptxas spills up to 56 bytes for sm_120a and sm_121a, none with block_n 64; not timed there.
    64: TileConfig(head_dim=64, block_n=96, kv_stages=5, stack_bytes=56),
    # 406 / 400; block_n 80, 2 slots: 408 / 404
    # ptxas spills up to 48 bytes, outside the key loop.
    96: TileConfig(head_dim=96, block_n=64, kv_stages=4, stack_bytes=48),
    # 432 / 416; block_n 48 lost 5 %, block_n 32 with 4 slots 14 %
    # ptxas spills up to 152 bytes for sm_120a and sm_121a, where it renames the accumulators; what
    # that costs there has not been timed.
    128: TileConfig(head_dim=128, block_n=64, kv_stages=2, stack_bytes=152),
}
