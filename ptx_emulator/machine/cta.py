"""A CTA: its place in the grid, its shared memory, barriers and tensor memory."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..check.cluster_races import Races, races_of
from ..check.races import WORD
from ..findings import BarrierFault, OutOfBounds, Unmodelled
from .barriers import MBarrier, NamedBarrier
from .memory import DEFINED, RANK_SHIFT, RESERVED_SMEM, SharedMemory

if TYPE_CHECKING:
    from .machine import Machine

Dim3 = tuple[int, int, int]
_AXES = {"x": 0, "y": 1, "z": 2}


class Cta:
    """A cooperative thread array. `peers` are the CTAs of its cluster by rank, itself included."""

    def __init__(self, machine: "Machine", ctaid: Dim3, rank: int, peers: list["Cta"]) -> None:
        self.machine = machine
        self.ctaid = ctaid
        self.rank = rank
        self.peers = peers
        self.smem = SharedMemory(machine.smem_size, machine.strict)
        self.race: Races | None = None
        if machine.findings.races:
            ranks, first = int(np.prod(machine.launch.cluster)), peers[0].race if rank else None
            watched = machine.num_warps, self.smem.size, machine.findings
            self.race = races_of(*watched, rank, first, ranks)
        self.shared_base = np.uint32(rank << RANK_SHIFT)
        self.mbarriers: dict[int, MBarrier] = {}
        self.unfenced: list[MBarrier] = []  # that its warps initialised, and no fence followed
        self.named: dict[int, NamedBarrier] = {}
        self.local = np.zeros((machine.num_threads, machine.local_size), np.uint8)
        self.ended = False  # its memory may belong to the next one
        self.state: dict[str, Any] = {}  # of instruction classes: tensor memory, register pool, …

    # ---- shared addresses ----
    def locate(self, address: int) -> tuple["Cta", int]:
        """The CTA and the offset that a shared address, the CTA's rank in its top bits, names."""
        rank, offset = address >> RANK_SHIFT, address & (1 << RANK_SHIFT) - 1
        if rank >= len(self.peers):
            raise OutOfBounds(
                f"shared address {address:#x} names rank {rank} of a cluster of {len(self.peers)}"
            )
        return self.peers[rank], offset

    def agent(self, warp: int) -> int:
        """A warp of this CTA among all whom the race checker knows."""
        return warp if self.race is None else self.race.first_warp + warp

    def words_to(self, other: "Cta") -> int:
        """How far a word of another CTA of the cluster is behind the same word of this one."""
        return (other.rank - self.rank) * (self.smem.size // WORD)

    def mbarrier(self, address: int) -> MBarrier:
        cta, offset = self.locate(address)
        barrier = cta.mbarriers.get(offset)
        if barrier is None:
            raise BarrierFault(
                f"no mbarrier was initialised at shared offset {offset:#x} of CTA {cta.ctaid}"
            )
        return barrier

    def init_mbarrier(self, address: int, count: int) -> None:
        cta, offset = self.locate(address)
        if offset % 8 or not RESERVED_SMEM <= offset <= cta.smem.size - 8:
            raise BarrierFault(f"mbarrier.init at shared offset {offset:#x}")
        if not 0 < count < 1 << 20:
            raise BarrierFault(f"mbarrier.init with a count of {count}")
        name = f"mbarrier at {offset - RESERVED_SMEM:#x} of CTA {cta.ctaid}"
        cta.mbarriers[offset] = MBarrier(name, count, watch=cta.race)
        cta.smem.shadow[offset : offset + 8] = DEFINED

    def named_barrier(self, index: int) -> NamedBarrier:
        if not 0 <= index < 16:
            raise BarrierFault(f"bar {index}: a CTA has barriers 0 .. 15")
        return self.named.setdefault(index, NamedBarrier(index))

    # ---- special registers ----
    def special(self, name: str, warps: np.ndarray) -> Any:
        """Value of a special register in `warps`: uint32 (or uint64), or a function of the time."""
        machine = self.machine
        launch = machine.launch
        base, _, axis = name.partition(".")
        per_axis = {
            "ntid": launch.block,
            "ctaid": self.ctaid,
            "nctaid": launch.grid,
            "clusterid": tuple(c // n for c, n in zip(self.ctaid, launch.cluster, strict=True)),
            "nclusterid": tuple(
                -(-g // n) for g, n in zip(launch.grid, launch.cluster, strict=True)
            ),
            "cluster_ctaid": tuple(c % n for c, n in zip(self.ctaid, launch.cluster, strict=True)),
            "cluster_nctaid": launch.cluster,
        }
        if base in per_axis:
            return np.uint32(per_axis[base][_AXES[axis]])
        scalars = {
            "cluster_ctarank": self.rank,
            "cluster_nctarank": len(self.peers),
            "is_explicit_cluster": int(len(self.peers) > 1),
            "nwarpid": machine.num_warps,
            "nsmid": machine.card.num_sms,
            "smid": self.machine.sm_of(self),
            "dynamic_smem_size": launch.dynamic_smem,
            "total_smem_size": launch.dynamic_smem + launch.static_smem,
            "gridid": 0,
        }
        if base in scalars:
            return np.uint32(scalars[base])
        if base in ("clock", "globaltimer_lo", "clock_hi", "globaltimer_hi"):
            return lambda: np.uint32(machine.time() & 0xFFFFFFFF)
        if base in ("clock64", "globaltimer"):
            return lambda: np.uint64(machine.time())
        return self._per_lane(base, axis, warps)

    def _per_lane(self, base: str, axis: str, warps: np.ndarray) -> Any:
        lane = np.tile(np.arange(32, dtype=np.uint32), len(warps))
        if base == "laneid":
            return lane
        if base == "warpid":
            return (
                np.uint32(warps[0]) if len(warps) == 1 else np.repeat(warps, 32).astype(np.uint32)
            )
        if base == "tid":
            linear = np.repeat(warps, 32).astype(np.uint32) * np.uint32(32) + lane
            x, y, _ = (np.uint32(n) for n in self.machine.launch.block)
            return (linear % x, linear // x % y, linear // (x * y))[_AXES[axis]]
        one = np.uint32(1)
        masks = {
            "lanemask_eq": one << lane,
            "lanemask_lt": (one << lane) - one,
            "lanemask_le": ((one << lane) - one) | (one << lane),
            "lanemask_gt": ~(((one << lane) - one) | (one << lane)),
            "lanemask_ge": ~((one << lane) - one),
        }
        if base in masks:
            return masks[base].astype(np.uint32)
        raise Unmodelled(f"special register %{base}")
