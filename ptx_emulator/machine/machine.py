"""Runs one launch: makes CTAs, lets gangs run, and says why nothing runs any more."""

import time as clock
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..check.global_memory import GlobalWatch
from ..findings import Deadlock, EmulationError, Findings, LaunchFault, UndefinedRead
from ..launch.host import Launch
from .async_ops import AsyncQueue
from .cards import Card
from .cta import Cta, Dim3
from .gang import BLOCKED, Gang
from .memory import GlobalMemory
from .progress import ProgressWatch
from .scheduler import Scheduler

if TYPE_CHECKING:
    from ..ptx.program import Program

LIVELOCK_BLOCKS = 2_000_000  # that may pass without a change that anyone could wait for
PROGRAMMATIC_SERIALIZATION = 6  # the attribute of a launch that may overlap the one before
RESIDENT_THREADS = 4096  # CTAs that run side by side before they have to wait for each other


class Machine:
    """The state of one launch."""

    def __init__(
        self,
        launch: Launch,
        program: "Program",
        card: Card,
        memory: GlobalMemory,
        scheduler: Scheduler,
        findings: Findings,
    ) -> None:
        self.strict = findings.strict
        self.hardware_sums = False
        self.launch = launch
        self.program = program
        self.card = card
        self.memory = memory
        self.scheduler = scheduler
        self.findings = findings
        self.global_watch: GlobalWatch | None = None
        self.num_threads = int(np.prod(launch.block))
        self.num_warps = -(-self.num_threads // 32)
        self.local_size = program.local_size
        self.smem_size = program.shared_size(launch.dynamic_smem)
        self.params = program.pack_params(launch.params)
        self.queue = AsyncQueue(scheduler)
        self.gangs: list[Gang] = []
        self.ctas: list[Cta] = []
        self.block_counts = [0] * (program.flow.exit + 1)
        self.warp_counts = np.zeros((program.flow.exit + 1, self.num_warps), np.int64)
        kinds = ("shared", "tmem", "tma")
        self.traffic = {kind: np.zeros(self.num_warps, np.int64) for kind in kinds}  # bytes
        self.times_blocked = np.zeros(self.num_warps, np.int64)
        self.watch = ProgressWatch(self, LIVELOCK_BLOCKS)
        self.started = clock.perf_counter()
        self._check_launch()
        self.waiting = self.clusters()  # that have not started

    def _check_launch(self) -> None:
        launch, card = self.launch, self.card
        if self.num_threads > 1024 or self.num_threads % 32:
            raise LaunchFault(f"block {launch.block} has {self.num_threads} threads")
        smem = launch.dynamic_smem + launch.static_smem
        if smem > card.smem_per_cta:
            raise LaunchFault(
                f"{smem} bytes of shared memory are asked for; {card.arch} has {card.smem_per_cta}"
            )
        if any(g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
            raise LaunchFault(f"grid {launch.grid} is no multiple of cluster {launch.cluster}")
        if int(np.prod(launch.cluster)) > 16:
            raise LaunchFault(f"cluster {launch.cluster} has more than 16 CTAs")

    def watch_global(self, watch: GlobalWatch) -> None:
        """Look for races in global memory, unless races are not looked for."""
        if self.findings.races:
            overlaps = any(
                kind == PROGRAMMATIC_SERIALIZATION and value[:4] != b"\0\0\0\0"
                for kind, value in self.launch.attributes
            )
            watch.begin([cluster[0] for cluster in self.clusters()], overlaps)
            self.global_watch = watch

    # ---- what instructions ask ----
    def add(self, gang: Gang) -> None:
        self.gangs.append(gang)

    def time(self) -> int:
        """A clock that advances with the work done."""
        return sum(self.block_counts)

    def sm_of(self, cta: Cta) -> int:
        return cta.state.setdefault("sm", 0)

    # ---- the run ----
    def clusters(self) -> Iterator[list[tuple[int, int, int]]]:
        """The CTA coordinates of each cluster, x fastest."""
        gx, gy, gz = self.launch.grid
        cx, cy, cz = self.launch.cluster
        for z in range(0, gz, cz):
            for y in range(0, gy, cy):
                for x in range(0, gx, cx):
                    yield [
                        (x + i, y + j, z + k)
                        for k in range(cz)
                        for j in range(cy)
                        for i in range(cx)
                    ]

    def run(self) -> None:
        """Execute the launch to its end."""
        more = True
        with np.errstate(all="ignore"):
            while True:
                while more and self._has_room():
                    more = self._start_cluster()
                self._run_resident()
                if not self.gangs and not more:
                    break
                if self.gangs and not (more and self._start_cluster()):
                    raise self.watch.livelock() if self.watch.stuck else self._deadlock()
                self.watch.stuck = False
            while self.queue.run_one():
                pass

    def _has_room(self) -> bool:
        resident = sum(gang.lanes for gang in self.gangs)
        limit = RESIDENT_THREADS if self.scheduler.adversarial else 1
        return resident < limit

    def cancel_cluster(self) -> Dim3 | None:
        """Take the next cluster that has not started out of the launch; its first CTA."""
        coordinates = next(self.waiting, None)
        return None if coordinates is None else coordinates[0]

    def _start_cluster(self) -> bool:
        coordinates = next(self.waiting, None)
        if coordinates is None:
            return False
        peers: list[Cta] = []
        for rank, ctaid in enumerate(coordinates):
            peers.append(Cta(self, ctaid, rank, peers))
        for cta in peers:
            registers: list[Any] = [None] * self.program.num_registers
            if not self.strict:
                for index, value in self.program.undefined.items():
                    registers[index] = value
            self.add(Gang(cta, np.arange(self.num_warps), registers))
        return True

    def _run_resident(self) -> None:
        """Run until no gang can, whatever the operations in flight do, or none comes further."""
        while not self.watch.stuck:
            ready = [gang for gang in self.gangs if gang.ready]
            if not ready:
                if not self.queue.run_one():
                    return
                continue
            if self.scheduler.lets_async_run() and self.queue.run_one():
                continue  # it may have woken who comes first
            gang = self.scheduler.next_gang(ready)
            self._merge(gang, ready)
            try:
                used_up = self._run_gang(gang)
            except EmulationError as error:
                raise error.at(self._where(gang)) from error
            if used_up:  # others first, or who spins would keep them from ending its wait
                self.gangs.remove(gang)
                self.gangs.append(gang)
                self.watch.look()
            if gang.done:
                self.gangs.remove(gang)
                self._end_cta(gang.cta)

    def _end_cta(self, cta: Cta) -> None:
        """Where the last warp of a CTA has ended, ask what the CTA held whether it was freed."""
        if not any(gang.cta is cta for gang in self.gangs):
            cta.ended = True
            for held in cta.state.values():
                if hasattr(held, "at_exit"):
                    held.at_exit()

    def _merge(self, gang: Gang, ready: list[Gang]) -> None:
        """Let gangs of one CTA that stand at the same block go on together."""
        if gang.stack or len(gang.warps) == self.num_warps or gang.pc == self.program.flow.exit:
            return
        for other in ready:
            same = other.cta is gang.cta and other.pc == gang.pc and other is not gang
            if same and not other.stack and not other.done:
                gang.absorb(other, self.program.flow.blocks[gang.pc].live_in)
                self.gangs.remove(other)

    def _run_gang(self, gang: Gang) -> bool:
        """Run a gang for its time slice; True if it could go on."""
        program, counts = self.program, self.block_counts
        exit_ = program.flow.exit
        part = self.scheduler.splits(len(gang.warps)) if not gang.stack else None
        if part:
            self.add(gang.part(np.array(part), gang.pc))
        for _ in range(self.scheduler.quantum()):
            pc = gang.pc
            if pc == exit_:
                gang.end()
                return False
            counts[pc] += len(gang.warps)
            self.warp_counts[pc, gang.warps] += 1
            try:
                if gang.mask is None:
                    following = program.plain[pc](gang, gang.R)
                else:
                    following = program.masked[pc](gang, gang.R)
            except EmulationError:
                raise
            except (TypeError, AttributeError, ValueError) as error:
                raise self._diagnose(gang, pc, error) from error
            if following == BLOCKED:  # or parted: the rest goes on later
                return False
            gang.arrive_at(following)
            if self.program.flow.blocks[pc].signals and self.scheduler.pauses():
                return False
        return True

    # ---- saying what went wrong ----
    def _diagnose(self, gang: Gang, pc: int, error: Exception) -> Exception:
        live = self.program.flow.blocks[pc].live_in
        names = [self.program.kernel.registers[i].name for i in live if gang.R[i] is None]
        if names:
            shown = ", ".join(sorted(names)[:5])
            return UndefinedRead(f"registers that nothing wrote are read: {shown} ({error})")
        return error

    def line_of(self, pc: int) -> int:
        blocks = self.program.flow.blocks
        return blocks[pc if pc < len(blocks) else -1].line

    def _where(self, gang: Gang) -> str:
        line = self.line_of(gang.pc)
        text = self.program.last_text(gang.pc)
        return f"{gang.name}, PTX line {line} and following{text}"

    def _deadlock(self) -> Deadlock:
        lines = [
            f"  {gang.name} before PTX line {self.line_of(gang.pc)} waits for {gang.reason}"
            for gang in self.gangs
        ]
        bars = {bar.describe() for gang in self.gangs for bar, _ in gang.awaited}
        return Deadlock("nothing can run:\n" + "\n".join(lines + [f"  {b}" for b in sorted(bars)]))
