"""The way in: a session is an emulated card with a schedule; `call` runs compiled callables."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .check.global_memory import GlobalWatch
from .counters import Role, roles
from .findings import Findings
from .launch.host import Host, Launch, bootstrap
from .launch.tensors import Allocations, wrap
from .machine.cards import Card, card_of
from .machine.machine import Machine
from .machine.memory import GlobalMemory
from .machine.scheduler import Scheduler
from .ptx.program import load
from .trace import Trace


@dataclass
class Run:
    """What one launch did."""

    kernel: str
    instructions: int  # warp instructions
    seconds: float
    roles: list[Role]  # issue slots by pipe


@dataclass
class Session:
    """An emulated card. Launches run at once, in order, whatever their stream."""

    card: Card
    schedule: int
    host: Host
    findings: Findings
    allocations: Allocations = field(default_factory=Allocations)
    runs: list[Run] = field(default_factory=list)
    trace: Trace | None = None
    hardware_sums: bool = False

    def __post_init__(self) -> None:
        self._watch = GlobalWatch(self.allocations, self.findings)

    def allow(self, value: Any) -> None:
        """Allow kernels to touch the memory of each CPU tensor in `value`, also in tuples."""
        if isinstance(value, torch.Tensor):
            self.allocations.add_tensor(value)
        elif isinstance(value, tuple):
            for member in value:
                self.allow(member)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a compiled CuTe DSL function with CPU tensors (also in tuples and dataclasses).

        Raises:
            EmulationError: the kernel did what the machine does not allow; see findings.py.
        """
        return self.run(function, *wrap(args, self.allocations))

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what launches through the stand-in of CUDA's driver, with arguments as they are."""
        self.host.error = None
        try:
            result = function(*args)
        except Exception:
            self._raise_error()
            raise
        self._raise_error()
        return result

    def _raise_error(self) -> None:
        if self.host.error is not None:
            error, self.host.error = self.host.error, None
            raise error

    def launch(self, launch: Launch) -> None:
        """Execute one launch."""
        program = load(launch.ptx, launch.kernel)
        for data in program.global_data.values():
            self.allocations.add(data.ctypes.data, data.nbytes, data)
        machine = Machine(
            launch,
            program,
            self.card,
            GlobalMemory(self.allocations),
            Scheduler(self.schedule),
            self.findings,
        )
        machine.watch_global(self._watch)
        machine.hardware_sums = self.hardware_sums
        watch = self.trace.watch(machine) if self.trace is not None else None
        start = time.perf_counter()
        try:
            machine.run()
        finally:
            found = roles(machine)
            if watch is not None:
                watch.close(found)
        sizes = [len(block.code) + 1 for block in program.flow.blocks]
        issued = sum(n * size for n, size in zip(machine.block_counts, sizes, strict=False))
        seconds = time.perf_counter() - start
        self.runs.append(Run(launch.kernel, issued, seconds, found))

    @property
    def instructions(self) -> int:
        return sum(run.instructions for run in self.runs)

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)


@contextmanager
def session(
    arch: str | Card,
    schedule: int = 0,
    collect: bool = False,
    strict: bool | Literal["fences"] = False,
    races: bool = True,
    trace: Trace | None = None,
    hardware_sums: bool = False,
) -> Iterator[Session]:
    """An emulated card of `arch` ("sm_90a", "sm100a", …) to which all launches go.

    Args:
        arch: which card, by its name or as one of another size; also what CuTe DSL compiles for if
            nothing else is said.
        schedule: seed of all choices of order; 0 runs gangs as long as they can.
        collect: keep reportable findings in `findings` and go on, instead of raising.
        strict: a read of shared memory that nothing wrote is a fault, not a NaN. "fences": so is
            the lack of a tcgen05.fence or tcgen05.wait::ld that the PTX manual demands, or of the
            wait for bulk stores before their warp ends, although cards seem to do without.
        races: report accesses to shared memory that nothing orders; without it runs are faster.
        trace: keep what each warp does, for Perfetto.
        hardware_sums: let mma.sync and wgmma add f16 and bf16 products bit for bit as an H200 does,
            not in float64; slower.
    """
    host = bootstrap()
    card = arch if isinstance(arch, Card) else card_of(arch)
    host.set_device(card.major, card.minor, card.num_sms)
    host.set_arch(card.arch)
    findings = Findings(collect, bool(strict), races, strict == "fences")
    emulated = Session(card, schedule, host, findings, trace=trace)
    emulated.hardware_sums = hardware_sums
    before, host.on_launch = host.on_launch, emulated.launch
    try:
        yield emulated
    finally:
        host.on_launch = before
