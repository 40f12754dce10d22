"""Tile configurations of the tcgen05 forward kernel, as data, with what each row rests on."""

from dataclasses import dataclass, replace
from typing import Any

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
SCORE_SLOTS = 2  # of S and P: they belong to what takes turns on the tensor core
TILE_SLOTS = 4  # tiles that some roles have begun and others have not, where a counter gives them
TILE_WORDS = 9  # that describe one
STAGED_BYTES = 128  # of a row of O that pass through shared memory at a time
SWIZZLE_COLUMNS = (64, 32, 16)  # 16-bit columns of a row of a swizzle atom, best first
MIN_BOX_ROWS = 8  # of keys that TMA brings: smaller pages would take too many instructions
# With pages ptxas keeps one register, the thread's number, in local memory: roles read it a few
# times a tile, the MMA warp a few times a key block, the loops of the softmax never.
PAGED_STACK_BYTES = 8
PAIRS_PER_UNIT = 16  # pairs of columns: the unit in which exponentials are moved to the FMA units


def swizzle_columns(columns: int) -> int:
    """16-bit columns of one swizzle atom: the widest of 64, 32, 16 that divides `columns`."""
    return next(n for n in SWIZZLE_COLUMNS if columns % n == 0)


@dataclass(frozen=True, slots=True)
class RegisterBudget:
    """Registers a thread of each warpgroup after `setmaxnreg`."""

    softmax: int
    correction: int
    other: int

    @property
    def changes(self) -> set[tuple[str, int]]:
        """What `setmaxnreg` does, from the registers that the threads start with: 65536 in all."""
        return {("inc", self.softmax), ("dec", self.correction), ("dec", self.other)}


@dataclass(frozen=True, slots=True)
class WarpRoles:
    """Which warps do what. The last warpgroup holds the MMA and the load warp, one that gathers V
    where TMA does not bring it, and one that takes tiles from the counter where there is one.
    """

    softmax_end: int
    correction_end: int
    mma: int
    load: int
    gather_v: int
    schedule: int
    num_warps: int

    @staticmethod
    def of(q_tiles: int) -> "WarpRoles":
        """A warpgroup for the softmax of each Q tile, one for the correction, one for the rest."""
        softmax, correction = (n * WARPS_PER_GROUP for n in (q_tiles, q_tiles + 1))
        return WarpRoles(softmax, correction, *range(correction, correction + WARPS_PER_GROUP + 1))

    def arrivals(self, role: str) -> int:
        """Arrivals of a role that hands a slot on: one a warp, or one a thread whose copies end."""
        return {
            "load": 1,
            "load_v": 1,
            "gather": WARP_SIZE,
            "schedule": 1,
            "mma": 1,
            "softmax": WARPS_PER_GROUP,
            "all_softmax": self.softmax_end,
            "correction": WARPS_PER_GROUP,
        }[role]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """One configuration of the tcgen05 forward kernel.

    Tiles of Q and K have `head_dim` columns, those of V and O `head_dim_v`; tensors have at most as
    many, and TMA fills up with zeros. K and V take turns in `kv_stages` slots.

    A CTA has `q_tiles` tiles of 128 queries: two that take turns, or one whose key blocks do.
    `ctas` 2 is a pair of CTAs on neighbouring SMs, which multiply as one: each has its own rows of
    Q, S, P and O, half of the keys of a block of K, and half of the columns of V.

    `emulated_pairs` of every 16 pairs of scores take their exponential on the FMA units, always
    the same columns, so that a row's result does not depend on which blocks need a mask.
    `max_on_load`: `tcgen05.ld.red` returns the row maximum with the scores (sm_103). `stack_bytes`
    is the most that ptxas may spill a thread.

    `p_apart`: P has columns of its own in tensor memory, so that the next scores need not wait for
    the product that reads it.

    The plan adds what the table leaves open: `group` query heads of one key head share tiles (1:
    none do), and K and V lie in memory in pieces of `box_n` rows at least (None: in one piece).
    Pieces of fewer than `MIN_BOX_ROWS` are gathered by cp.async.
    """

    head_dim: int
    head_dim_v: int
    kv_stages: int
    emulated_pairs: int
    max_on_load: bool = False
    stack_bytes: int = 0
    registers: RegisterBudget = RegisterBudget(softmax=192, correction=80, other=48)
    ctas: int = 1
    q_tiles: int = 2
    p_apart: bool = False
    group: int = 1
    box_n: int | None = None

    @property
    def roles(self) -> WarpRoles:
        return WarpRoles.of(self.q_tiles)

    @property
    def family(self) -> str:
        """The kernels that these tiles are for."""
        return "sm100"

    @property
    def is_general(self) -> bool:
        """Whether the kernel also reads pages, splits keys and packs heads."""
        return True

    @property
    def counts_tiles(self) -> bool:
        """Whether CTAs take tiles from a counter where sequences differ: pairs do not."""
        return self.ctas == 1

    @property
    def gathers(self) -> bool:
        """Whether K and V are copied row by row."""
        return self.box_n is not None and self.box_n < MIN_BOX_ROWS

    @property
    def block_m(self) -> int:
        """Query rows of one CTA, or of a pair."""
        return self.ctas * self.q_tiles * BLOCK_M

    @property
    def block_tokens(self) -> int:
        """Queries of one head of one CTA, or of a pair."""
        return self.ctas * self.q_tiles * (BLOCK_M // self.group)

    @property
    def block_n(self) -> int:
        return BLOCK_N

    @property
    def q_parts(self) -> int:
        """Slots of a Q tile. Of two, one is loaded behind the products of the other; of one, the
        columns of a swizzle atom come and go by themselves, behind the products of the rest."""
        return 1 if self.q_tiles == 2 else self.head_dim // swizzle_columns(self.head_dim)

    @property
    def num_threads(self) -> int:
        return self.roles.num_warps * WARP_SIZE

    @property
    def k_rows(self) -> int:
        """Keys of a block of K that one CTA holds."""
        return BLOCK_N // self.ctas

    @property
    def v_columns(self) -> int:
        """Columns of a block of V that one CTA holds."""
        return self.head_dim_v // self.ctas

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the ring of K and V."""
        return ELEMENT_BYTES * max(self.k_rows * self.head_dim, BLOCK_N * self.v_columns)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA: Q, the ring of K and V, the staged O, statistics, barriers."""
        q = ELEMENT_BYTES * self.q_tiles * BLOCK_M * self.head_dim
        kv = self.kv_stages * self.slot_bytes
        staged = BLOCK_M * STAGED_BYTES
        statistics = 3 * 4 * SCORE_SLOTS * BLOCK_M
        tiles = 4 * TILE_SLOTS * TILE_WORDS if self.counts_tiles else 0
        # The barriers stand before the statistics, up to where Q can be aligned.
        head = -(-(BARRIER_BYTES + tiles + statistics) // ALIGNMENT) * ALIGNMENT
        return head + q + kv + staged

    def holds(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether tensors of these head dimensions fit into the tiles."""
        return head_dim <= self.head_dim and head_dim_v <= self.head_dim_v

    def in_boxes(self, box_n: int | None) -> "TileConfig":
        """The same for K and V in pieces of `box_n` rows."""
        spilled = self.stack_bytes if box_n is None else max(self.stack_bytes, PAGED_STACK_BYTES)
        return replace(self, box_n=box_n, stack_bytes=spilled)

    def explain(self) -> str:
        """What the tiles are, for people."""
        pair = "a pair of CTAs with " if self.ctas == 2 else ""
        rows = f"{BLOCK_M} queries"
        if self.group > 1:
            rows = f"{BLOCK_M // self.group} queries of {self.group} heads"
        pages = f" in boxes of {self.box_n}" if self.box_n else ""
        pages = " gathered by cp.async" if self.gathers else pages
        return (
            f"{pair}{self.q_tiles} x {rows} x {BLOCK_N} keys{pages}, "
            f"{self.kv_stages} K/V slots, "
            f"{self.emulated_pairs} of {PAIRS_PER_UNIT} exponentials on FMA units, "
            f"{self.smem_bytes} bytes of shared memory"
        )

    def check(self) -> None:
        """Assert what the kernel takes for granted; a row that fails is our bug."""
        assert self.head_dim % 16 == 0 and self.v_columns % 16 == 0, "MMA steps of 16"
        assert self.ctas in (1, 2) and self.q_tiles in (1, 2)
        assert not self.p_apart or self.q_tiles == 2, "one Q tile is a block ahead without"
        assert self.kv_stages >= 2, "V of a block is awaited while the next K is"
        assert 1 <= self.group <= BLOCK_M, "a tile holds whole tokens"
        assert self.k_rows % (self.box_n or self.k_rows) == 0, "a block is boxes"
        assert 0 <= self.emulated_pairs <= PAIRS_PER_UNIT
        assert self.smem_bytes <= SMEM_LIMIT, f"{self} needs {self.smem_bytes} bytes"
        r = self.registers
        per_lane = self.q_tiles * r.softmax + r.correction + r.other
        assert per_lane * WARPS_PER_GROUP * WARP_SIZE <= REGISTER_FILE, f"{self} overdraws"
        assert all(n % 8 == 0 for n in (r.softmax, r.correction, r.other))


def _row(
    head_dim: int, head_dim_v: int, emulated_pairs: int, stack_bytes: int = 0, **more: Any
) -> TileConfig:
    """A row with as many slots as there is room for."""
    row = TileConfig(
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        kv_stages=MAX_STAGES,
        emulated_pairs=emulated_pairs,
        stack_bytes=stack_bytes,
        **more,
    )
    excess = max(0, row.smem_bytes - SMEM_LIMIT)
    return replace(row, kv_stages=MAX_STAGES - -(-excess // row.slot_bytes))


def _pair_of_wide_tiles(head_dim: int) -> TileConfig:
    """A row of a pair with one Q tile a CTA: the exponentials have time, twice what they take."""
    return _row(
        head_dim,
        head_dim,
        0,
        ctas=2,
        q_tiles=1,
        registers=RegisterBudget(softmax=240, correction=160, other=96),
    )


# Modelled, not measured (2026-11): no card of the family was at hand. Cycles of an SM for one
# 128 x 128 tile, dense / causal at 1024 tokens, from benchmarks/compare_counters.py: tensor core,
# exponentials, issue slots. A pair of exponentials on the FMA units costs eleven slots a warp.
# What docs/design.md has at 2048 tokens is beside upstream's.
FORWARD_ROWS: dict[str, tuple[TileConfig, ...]] = {
    "sm100a": (
        # 512, 906, 703 / 512, 908, 830; the timing model has 3 pairs 1 to 2 % behind
        # Without a mask it spills 8 bytes. Packed sequences under two bounds spilled 8, too, until
        # P was apart, and 32 with 192 registers for the softmax.
        _row(
            64,
            64,
            2,
            stack_bytes=8,
            registers=RegisterBudget(softmax=200, correction=64, other=48),
            p_apart=True,
        ),
        _row(96, 96, 3),
        # causal 1024, 1008, 1002; with 4 pairs: 1024, 778, 833 / 1024, 866, 1104
        _row(128, 128, 2),
        # causal 1280, 1150, 912
        _row(192, 128, 0),
        _pair_of_wide_tiles(256),
    ),
    "sm103a": tuple(
        replace(row, max_on_load=True)
        for row in (
            _row(64, 64, 0, p_apart=True),
            _row(96, 96, 0),
            _row(128, 128, 0),
            _row(192, 128, 0, stack_bytes=8),
            _pair_of_wide_tiles(256),
        )
    ),
}


def _pairs(rows: tuple[TileConfig, ...]) -> tuple[TileConfig, ...]:
    """Of rows with two Q tiles, those that the tensor core bounds, as pairs."""
    return tuple(
        replace(
            _row(row.head_dim, row.head_dim_v, row.emulated_pairs, ctas=2),
            max_on_load=row.max_on_load,
        )
        for row in rows
        if row.ctas == 1 and row.head_dim >= 128
    )


# Alternatives for rows of the same widths: half of the shared memory and of the L2 reads of K and
# V a CTA, for tiles of 512 rows that both CTAs finish together. `plan` says where that pays.
PAIR_ROWS: dict[str, tuple[TileConfig, ...]] = {
    variant: _pairs(rows) for variant, rows in FORWARD_ROWS.items()
}
