"""A launch as a trace that Perfetto (or chrome://tracing) opens: one track a warp.

Time is the order of emulation, an instruction a microsecond, and says nothing about a card: warps
that run together (a gang) share their time, others come one after the other. A track shows

    what the warp issued, named after the most telling pipe of each stretch of code
    wait: from where it was suspended until it went on, named after what it waited for

and beside the warps of a CTA, one track a kind of asynchronous operation, from issue to end.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .counters import pipe_of
from .machine.async_ops import AsyncOp, AsyncQueue
from .machine.gang import BLOCKED, Gang

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .counters import Role
    from .machine.machine import Machine

TELLING = ("tensor", "mufu", "tma", "fma", "lsu", "barrier", "alu", "other")
MOST_EVENTS = 1_000_000
FIRST_ASYNC_TRACK = 1000


@dataclass
class Trace:
    """Events of all launches, each after the one before."""

    events: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    processes: int = 0

    def watch(self, machine: "Machine") -> "Watch":
        """Record what a machine does from now on."""
        return Watch(self, machine)

    def add(self, event: dict[str, Any]) -> None:
        if len(self.events) < MOST_EVENTS:
            self.events.append(event)

    def write(self, path: Path) -> None:
        """Chrome's JSON format."""
        text = json.dumps({"traceEvents": self.events, "displayTimeUnit": "ns"})
        path.write_text(text + "\n")


class Watch:
    """Stands between a machine and its program's code, and in the place of its queue."""

    def __init__(self, trace: Trace, machine: "Machine") -> None:
        self.trace, self.machine = trace, machine
        self.ctas: dict[int, int] = {}  # id of a Cta -> process
        self.alive: list[Any] = []  # so that no id is used twice
        self.kinds: dict[tuple[int, str], int] = {}  # (process, kind of operation) -> track
        self.stretches: dict[tuple[int, int], list[Any]] = {}  # (process, warp) -> name, from, to
        self.waiting: dict[tuple[int, int], tuple[int, str]] = {}
        self.flying: dict[int, tuple[int, int, str]] = {}  # id of an AsyncOp -> issue
        self.gang: Gang | None = None
        blocks = machine.program.flow.blocks
        self.sizes = [len(block.code) + 1 for block in blocks]
        self.names = [_most_telling(block.code) for block in blocks]
        machine.program = _Watched(machine.program, self)  # type: ignore[assignment]
        machine.queue = _Queue(machine.scheduler, watch=self)

    def process(self, cta: Any) -> int:
        if id(cta) not in self.ctas:
            number = self.ctas[id(cta)] = self.trace.processes
            self.trace.processes += 1
            name = f"{self.machine.launch.kernel[:40]} CTA {cta.ctaid}"
            self._name("process_name", number, 0, name)
            self.alive.append(cta)
        return self.ctas[id(cta)]

    def _name(self, what: str, process: int, track: int, name: str) -> None:
        event = {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}
        self.trace.events.append(event)  # however many there are

    # ---- warps ----
    def run(self, function: Any, gang: Gang, pc: int) -> int:
        """Execute a block, and record it for each warp of the gang."""
        process, warps, start = self.process(gang.cta), gang.warps.tolist(), self.trace.now
        self.gang = gang
        for warp in warps:
            self._resume(process, warp, start)
        following = function(gang, gang.R)
        self.trace.now = end = start + self.sizes[pc]
        for warp in warps:
            stretch = self.stretches.get((process, warp))
            if stretch and stretch[0] == self.names[pc] and stretch[2] == start:
                stretch[2] = end
            else:
                self._close(process, warp)
                self.stretches[process, warp] = [self.names[pc], start, end]
        if following == BLOCKED:
            self._suspended(gang.cta, process)
        return following

    def _suspended(self, cta: Any, process: int) -> None:
        """Note which warps of a CTA wait, be it that their gang has just parted."""
        current = [self.gang] if self.gang not in self.machine.gangs else []
        for gang in (*self.machine.gangs, *current):
            if gang is None or gang.cta is not cta or gang.ready or gang.done:
                continue
            for warp in gang.warps.tolist():
                self.waiting.setdefault((process, warp), (self.trace.now, gang.reason))

    def _resume(self, process: int, warp: int, now: int) -> None:
        if (process, warp) in self.waiting:
            since, reason = self.waiting.pop((process, warp))
            self._close(process, warp)
            self._slice(process, warp, ("wait: " + reason, since, now))

    def _close(self, process: int, warp: int) -> None:
        stretch = self.stretches.pop((process, warp), None)
        if stretch is not None:
            self._slice(process, warp, stretch)

    def _slice(self, process: int, track: int, what: "Iterable[Any]") -> None:
        name, start, end = what
        times = {"ts": start, "dur": max(end - start, 0)}
        self.trace.add({"ph": "X", "name": name, "pid": process, "tid": track, **times})

    # ---- asynchronous operations ----
    def issued(self, op: AsyncOp) -> None:
        cta = op.owner or (self.gang.cta if self.gang is not None else None)
        if cta is not None:
            self.flying[id(op)] = (self.process(cta), self.trace.now, self._issuer())

    def _issuer(self) -> str:
        return "" if self.gang is None else self.gang.name

    def ended(self, op: AsyncOp) -> None:
        if id(op) not in self.flying:
            return
        process, since, issuer = self.flying.pop(id(op))
        track = self.kinds.get((process, op.name))
        if track is None:
            track = FIRST_ASYNC_TRACK + len([p for p, _ in self.kinds if p == process])
            self.kinds[process, op.name] = track
            self._name("thread_name", process, track, op.name)
        # operations overlap, so they are a pair of events and not a slice
        common = {"name": op.name, "cat": op.name, "pid": process, "tid": track}
        common["id"] = len(self.trace.events)
        args = {"issued by": issuer}
        self.trace.add({"ph": "b", "ts": since, "args": args, **common})
        self.trace.add({"ph": "e", "ts": max(self.trace.now, since + 1), **common})

    # ---- the end ----
    def close(self, roles: "list[Role]") -> None:
        """Write what is still open, and name each track after its warp's role."""
        for process, warp in list(self.waiting):
            self._resume(process, warp, self.trace.now)
        for process, warp in list(self.stretches):
            self._close(process, warp)
        for role in roles:
            for warp in role.warps:
                for process in self.ctas.values():
                    self._name("thread_name", process, warp, f"warp {warp} {role.name}")


def _most_telling(code: "list[Any]") -> str:
    pipes = {pipe_of(instruction) for instruction in code}
    return next((pipe for pipe in TELLING if pipe in pipes), "other")


class _Watched:
    """A program whose blocks report to a watch; everything else is the program's own."""

    def __init__(self, program: Any, watch: Watch) -> None:
        self._program = program
        self.plain = _Blocks(program.plain, watch)
        self.masked = _Blocks(program.masked, watch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


@dataclass
class _Blocks:
    functions: list[Any]
    watch: Watch

    def __getitem__(self, pc: int) -> Any:
        return lambda gang, registers: self.watch.run(self.functions[pc], gang, pc)


@dataclass
class _Queue(AsyncQueue):
    """A queue that reports what is issued and what has ended."""

    watch: Any = None

    def add(self, op: AsyncOp) -> AsyncOp:
        self.watch.issued(op)
        return super().add(op)

    def finish(self, ops: "Iterable[AsyncOp]") -> None:
        for op in ops:
            if not op.done:
                super().finish([op])
                self.watch.ended(op)
