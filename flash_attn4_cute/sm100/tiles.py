"""Tile configurations of the tcgen05 forward kernel, as data, with what each row rests on."""

from dataclasses import dataclass, replace

WARP_SIZE = 32
WARPS_PER_GROUP = 4
REGISTER_FILE = 65536  # 32-bit registers of one SM
SMEM_LIMIT = 232448  # bytes a CTA may opt in to
ALIGNMENT = 1024  # of tiles that TMA or the MMA sees
MAX_STAGES = 8  # more slots of K and V than that hide nothing
BARRIER_BYTES = 512  # at most: mbarriers, and the address of tensor memory
TMEM_COLUMNS = 512
ELEMENT_BYTES = 2  # of Q, K, V and O
BLOCK_M = 128  # query rows of one tile: the lanes of tensor memory, one softmax thread each
BLOCK_N = 128
NUM_Q_TILES = 2  # tiles that take turns on the tensor core
STAGED_COLUMNS = 64  # of O that pass through shared memory at a time
SWIZZLE_COLUMNS = (64, 32, 16)  # 16-bit columns of a row of a swizzle atom, best first
PAIRS_PER_UNIT = 8  # pairs of columns: the unit in which exponentials are moved to the FMA units


@dataclass(frozen=True, slots=True)
class RegisterBudget:
    """Registers a thread of each warpgroup after `setmaxnreg`."""

    softmax: int
    correction: int
    other: int

    @property
    def changes(self) -> set[tuple[str, int]]:
        """What `setmaxnreg` does, from the 128 registers that 512 threads start with."""
        return {("inc", self.softmax), ("dec", self.correction), ("dec", self.other)}


@dataclass(frozen=True, slots=True)
class WarpRoles:
    """Which warps do what. Warpgroup 3 holds the load and the MMA warp and two idle ones."""

    softmax_end: int = NUM_Q_TILES * WARPS_PER_GROUP
    correction_end: int = (NUM_Q_TILES + 1) * WARPS_PER_GROUP
    mma: int = 12
    load: int = 13
    num_warps: int = 16

    def arrivals(self, role: str) -> int:
        """Warps of a role that arrive when they hand a slot on: one arrival each."""
        return {"load": 1, "mma": 1, "softmax": WARPS_PER_GROUP, "correction": WARPS_PER_GROUP}[
            role
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """One configuration of the tcgen05 forward kernel.

    Tiles of Q and K have `head_dim` columns, those of V and O `head_dim_v`; tensors have at most as
    many, and TMA fills up with zeros. K and V take turns in `kv_stages` slots of K's width.
    `emulated_pairs` of every eight pairs of scores take their exponential on the FMA units, always
    the same columns, so that a row's result does not depend on which blocks need a mask.
    `max_on_load`: `tcgen05.ld.red` returns the row maximum with the scores (sm_103). `stack_bytes`
    is the most that ptxas may spill a thread.
    """

    head_dim: int
    head_dim_v: int
    kv_stages: int
    emulated_pairs: int
    max_on_load: bool = False
    stack_bytes: int = 0
    registers: RegisterBudget = RegisterBudget(softmax=192, correction=80, other=48)
    roles: WarpRoles = WarpRoles()

    @property
    def family(self) -> str:
        """The kernels that these tiles are for."""
        return "sm100"

    @property
    def block_m(self) -> int:
        """Query rows of one CTA."""
        return NUM_Q_TILES * BLOCK_M

    @property
    def block_n(self) -> int:
        return BLOCK_N

    @property
    def num_threads(self) -> int:
        return self.roles.num_warps * WARP_SIZE

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring of K and V."""
        return ELEMENT_BYTES * BLOCK_N * self.head_dim

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA: Q, the ring of K and V, the staged O, statistics, barriers."""
        q = ELEMENT_BYTES * NUM_Q_TILES * BLOCK_M * self.head_dim
        kv = self.kv_stages * self.slot_bytes
        staged = ELEMENT_BYTES * BLOCK_M * STAGED_COLUMNS
        statistics = 3 * 4 * NUM_Q_TILES * BLOCK_M
        # The barriers stand before the statistics, up to where Q can be aligned.
        head = -(-(BARRIER_BYTES + statistics) // ALIGNMENT) * ALIGNMENT
        return head + q + kv + staged

    def holds(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether tensors of these head dimensions fit into the tiles."""
        return head_dim <= self.head_dim and head_dim_v <= self.head_dim_v

    def explain(self) -> str:
        """What the tiles are, for people."""
        return (
            f"{NUM_Q_TILES} x {BLOCK_M} queries x {BLOCK_N} keys, {self.kv_stages} K/V slots, "
            f"{self.emulated_pairs} of {PAIRS_PER_UNIT} exponentials on FMA units, "
            f"{self.smem_bytes} bytes of shared memory"
        )

    def check(self) -> None:
        """Assert what the kernel takes for granted; a row that fails is our bug."""
        assert self.head_dim % 16 == 0 and self.head_dim_v % 16 == 0, "MMA steps of 16"
        widths = [self.head_dim, self.head_dim_v]
        swizzles = {next(n for n in SWIZZLE_COLUMNS if width % n == 0) for width in widths}
        assert self.head_dim_v <= self.head_dim and len(swizzles) == 1, "K and V share slots"
        assert self.kv_stages >= 2, "V of a block is awaited while the next K is"
        assert 0 <= self.emulated_pairs <= PAIRS_PER_UNIT
        assert self.smem_bytes <= SMEM_LIMIT, f"{self} needs {self.smem_bytes} bytes"
        r = self.registers
        per_lane = NUM_Q_TILES * r.softmax + r.correction + r.other
        assert per_lane * WARPS_PER_GROUP * WARP_SIZE <= REGISTER_FILE, f"{self} overdraws"
        assert all(n % 8 == 0 for n in (r.softmax, r.correction, r.other))


def _row(head_dim: int, head_dim_v: int, emulated_pairs: int, stack_bytes: int = 0) -> TileConfig:
    """A row with as many slots as there is room for."""
    row = TileConfig(
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        kv_stages=MAX_STAGES,
        emulated_pairs=emulated_pairs,
        stack_bytes=stack_bytes,
    )
    excess = max(0, row.smem_bytes - SMEM_LIMIT)
    return replace(row, kv_stages=MAX_STAGES - -(-excess // row.slot_bytes))


# Modelled, not measured (2026-11): no card of the family was at hand. Cycles of an SM for one
# 128 x 128 tile, dense / causal at 1024 tokens, from benchmarks/compare_counters.py: tensor core,
# exponentials, issue slots. A pair of exponentials on the FMA units costs eleven slots a warp.
FORWARD_ROWS: dict[str, tuple[TileConfig, ...]] = {
    "sm100a": (
        # 512, 778, 783 / 512, 866, 1018; with 3 pairs of 8: 512, 650, 874 / 512, 724, 1121
        _row(64, 64, 2, stack_bytes=16),
        _row(96, 96, 2, stack_bytes=16),
        # causal 1024, 1008, 1002; with 2 pairs of 8: 1024, 778, 833 / 1024, 866, 1104
        _row(128, 128, 1, stack_bytes=48),
        # causal 1280, 1150, 912
        _row(192, 128, 0, stack_bytes=136),
    ),
    "sm103a": tuple(
        replace(_row(*dims, 0), max_on_load=True)
        for dims in ((64, 64), (96, 96), (128, 128), (192, 128))
    ),
}
