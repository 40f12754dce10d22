"""Rings of slots that roles hand to each other through mbarriers.

A ring says which roles fill a slot and which free it. Its arrival counts follow from that, every
arrival in the code names its role, and `check` asserts after tracing that all roles arrive. State
lives in the roles' own locals: a `Cursor`, or a slot that never changes and a phase.
"""

from dataclasses import dataclass, field
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from . import pair
from .tiles import SCORE_SLOTS, TILE_SLOTS, TILE_WORDS, TileConfig, WarpRoles


@dataclass
class Arrivals:
    """Who must arrive to end a phase, in each of `ctas` CTAs; and, while tracing, who does."""

    roles: WarpRoles
    by: tuple[str, ...]
    ctas: int = 1
    seen: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        return self.ctas * sum(self.roles.arrivals(role) for role in self.by)

    def record(self, role: str) -> None:
        assert role in self.by, f"{role} arrives where only {self.by} are counted"
        self.seen.add(role)


@dataclass(frozen=True)
class Ring:
    """`slots` slots with two mbarriers each: full, and empty if anybody has to free a slot.

    The roles in `full_by` and `empty_by` arrive once a warp, the MMA role by tcgen05.commit, the
    load role with the bytes that TMA will add, the gather role thread by thread. In a pair of CTAs,
    what the MMA role waits for arrives at the leader, from both, and the MMA role arrives in both.
    """

    name: Constexpr[str]
    slots: Constexpr[int]
    full_by: Constexpr[Arrivals]
    empty_by: Constexpr[Arrivals]
    ctas: Constexpr[int]
    barriers: cute.Pointer

    def full(self, slot):
        return self.barriers + slot

    def empty(self, slot):
        return self.barriers + self.slots + slot

    def init(self):
        """Set the counts; by one thread."""
        for slot in range(self.slots):
            cute.arch.mbarrier_init(self.full(slot), self.full_by.count)
            if self.empty_by.by:
                cute.arch.mbarrier_init(self.empty(slot), self.empty_by.count)

    def check(self):
        """Assert, once the kernel is traced, that whoever is counted arrives."""
        for arrivals in (self.full_by, self.empty_by):
            assert arrivals.seen == set(arrivals.by), (
                f"ring {self.name} counts {arrivals.by}, of which {arrivals.seen} arrive"
            )

    def wait_full(self, slot, phase):
        cute.arch.mbarrier_wait(self.full(slot), phase)
        if "gather" in self.full_by.by:
            # The tensor core reads through the async proxy what cp.async wrote past it.
            cute.arch.fence_proxy("async.shared", space="cta")

    def wait_empty(self, slot, phase):
        """Wait until the slot is free for its phase-th filling; the first finds it free."""
        cute.arch.mbarrier_wait(self.empty(slot), phase ^ 1)

    def arrive_full(self, role: str, slot, stored: bool = False):
        """One arrival of this warp, after all of its threads. `stored`: to shared memory."""
        self.full_by.record(role)
        _arrive(self.full(slot), self.full_by.ctas, stored)

    def arrive_empty(self, role: str, slot):
        self.empty_by.record(role)
        _arrive(self.empty(slot), self.empty_by.ctas, False)

    def expect(self, role: str, slot, num_bytes: int):
        """The arrival of a role that fills the slot by TMA."""
        self.full_by.record(role)
        with cute.arch.elect_one():
            pair.expect(self.full(slot), num_bytes, self.full_by.ctas)

    def arrive_copies(self, role: str, slot):
        """One arrival of each thread of this warp, when its cp.async so far are done."""
        self.full_by.record(role)
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full(slot))

    def commit_full(self, role: str, slot):
        """Arrive when the MMAs that the one thread has issued are done."""
        self.full_by.record(role)
        pair.commit(self.full(slot), self.ctas)

    def commit_empty(self, role: str, slot):
        self.empty_by.record(role)
        pair.commit(self.empty(slot), self.ctas)


@cute.jit
def _arrive(barrier: cute.Pointer, ctas: Constexpr[int], stored: Constexpr[bool]):
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        pair.arrive(barrier, ctas, stored)


@dsl_user_op
def opaque(value: Int32, *, loc=None, ip=None) -> Int32:
    """`value`, of which the compiler knows nothing more.

    In a ring of two slots, it would find that each turn of a loop over K and V blocks begins with
    slot 0, and keep whatever follows from that in registers (d 192: 780 bytes of spills).
    """
    result = llvm.inline_asm(
        T.i32(),
        [Int32(value).ir_value(loc=loc, ip=ip)],
        "mov.b32 $0, $1;",
        "=r,r",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return Int32(result)


@dataclass(frozen=True)
class Cursor:
    """A place in a ring: slot and phase. `next` gives the place after it; rebind it in the loop."""

    slots: Constexpr[int]
    slot: Int32
    phase: Int32

    @staticmethod
    def start(slots: int) -> "Cursor":
        return Cursor(slots, Int32(0), Int32(0))

    @cute.jit
    def next(self) -> "Cursor":
        last = self.slot == self.slots - 1
        slot = opaque(0 if last else self.slot + 1)
        phase = self.phase ^ 1 if last else self.phase
        return Cursor(self.slots, slot, phase)


@dataclass(frozen=True)
class Rings:
    """All rings of the kernel. A dash: nobody has to free the slot, what orders it is said there.

        q       Load -> Mma                 a Q tile, or columns of it      freed by Mma
        kv      Load or Gather -> Mma       a block of K or V               freed by Mma
        s       Mma -> Softmax              S in tensor memory              - or, P apart, Softmax
        p       Softmax, Correction -> Mma  first part of P, rescaled O     -
        p_tail  Softmax -> Mma              the rest of P                   -
        factor  Softmax -> Correction       what O must be multiplied with  -
        final   Softmax -> Correction       row sums and maxima             freed by Correction
        o       Mma -> Correction           the finished O                  -

    S, P: Q K^T of a tile's block i + 1 is issued behind P V of its block i, which waited for P,
    which was written after S was read. O: P V waits in `p` for the correction, which has read the
    last tile's O. Factor: that of block i + 1 comes after S of block i + 1, hence after the
    correction arrived in `p` for block i. So none of these barriers can run a phase ahead of who
    waits for it. `final` can, when tiles have one block each, and has an empty side for that.

    With one Q tile, the slots of s, p, p_tail and factor belong to its even and odd blocks. Then
    Q K^T of block i + 2 is issued behind P V of block i, and the same holds slot by slot. But S of
    a block no longer tells that the P V before it is done, so `o` tells of every one.

    Where P has columns of its own, S is free once it is in registers, and Q K^T of a tile's block
    i + 1 is issued before P V of its block i. Then `o` tells of every P V, too, and the softmax
    waits for that of block i before it hands on anything of block i + 1: P V has read P, and
    waited for the correction, which has read the factor. For the correction, the factor thus
    implies the P V before it, and the last P V alone is left to wait for. P V of block i + 1 needs
    what both hand on after that, so that `o` cannot run a phase ahead either.
    """

    q: Ring
    kv: Ring
    s: Ring
    p: Ring
    p_tail: Ring
    factor: Ring
    final: Ring
    o: Ring

    @staticmethod
    def allocate(smem, cfg: TileConfig) -> "Rings":
        """Declare the rings and lay their barriers out in shared memory."""
        ring = partial(_allocate_ring, smem, cfg)
        # Copies of cp.async arrive by themselves, but not at another CTA's barrier.
        bringer = "gather" if cfg.gathers and cfg.ctas == 1 else "load"
        return Rings(
            q=ring("q", cfg.q_tiles * cfg.q_parts, "load", "mma", "mma"),
            kv=ring("kv", cfg.kv_stages, bringer, "mma", "mma"),
            s=ring("s", SCORE_SLOTS, "mma", "softmax", "softmax" if cfg.p_apart else ""),
            p=ring("p", SCORE_SLOTS, "softmax correction", "mma"),
            p_tail=ring("p_tail", SCORE_SLOTS, "softmax", "mma"),
            factor=ring("factor", SCORE_SLOTS, "softmax", "correction"),
            final=ring("final", cfg.q_tiles, "softmax", "correction", "correction"),
            o=ring("o", cfg.q_tiles, "mma", "correction"),
        )

    def all(self) -> tuple[Ring, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class TileRings:
    """The rings that bring a CTA its tiles, where a counter gives them, and what is in their slots.

        tile    Schedule -> all others      what tile comes next            freed by all others
        ask     Load -> Schedule            that the next tile is wanted    -

    Load asks once it has the answer before.
    """

    tile: Ring
    ask: Ring
    sTile: cute.Tensor  # (words, slots)

    @staticmethod
    def allocate(smem, cfg: TileConfig) -> "TileRings":
        """As `Rings.allocate`."""
        readers = "load mma all_softmax correction" + " load_v" * cfg.gathers
        return TileRings(
            _allocate_ring(smem, cfg, "tile", TILE_SLOTS, "schedule", "all", readers),
            _allocate_ring(smem, cfg, "ask", 1, "load", "schedule"),
            smem.allocate_tensor(Int32, cute.make_layout((TILE_WORDS, TILE_SLOTS)), 16),
        )

    def all(self) -> tuple[Ring, ...]:
        return self.tile, self.ask


def _allocate_ring(
    smem, cfg: TileConfig, name: str, slots: int, full_by: str, to: str, empty_by: str = ""
) -> Ring:
    def arrivals(by: str, at: str) -> Arrivals:
        return Arrivals(cfg.roles, tuple(by.split()), cfg.ctas if at == "mma" else 1)

    return Ring(
        name,
        slots,
        arrivals(full_by, to),
        arrivals(empty_by, full_by),
        cfg.ctas,
        smem.allocate_array(cutlass.Int64, slots * (2 if empty_by else 1)),
    )
