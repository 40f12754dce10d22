"""Asynchronous operations: copies and matrix products that finish some time after their issue.

An operation runs when nothing else can (as late as the program allows), when a wait demands it, or
at a moment that the schedule picks. `after` orders operations of one pipe.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .scheduler import Scheduler


@dataclass(eq=False)
class AsyncOp:
    """One operation in flight. `run` has all its effects, completion signals included."""

    name: str
    run: Callable[[], None]
    after: tuple["AsyncOp", ...] = ()
    done: bool = False
    read: Callable[[], None] | None = None  # first half of a store: take the source's bytes
    was_read: bool = False
    owner: Any = None
    mark: Any = None  # what the race checker keeps of it


@dataclass
class AsyncQueue:
    """Operations in flight in the grid."""

    scheduler: Scheduler
    ops: list[AsyncOp] = field(default_factory=list)
    finished: int = 0

    def add(self, op: AsyncOp) -> AsyncOp:
        self.ops.append(op)
        return op

    def finish(self, ops: Iterable[AsyncOp]) -> None:
        for op in ops:
            if op.done:
                continue
            self.finish(op.after)
            self.finish_read(op)
            op.done = True
            self.ops.remove(op)
            self.finished += 1
            op.run()

    def finish_read(self, op: AsyncOp) -> None:
        if op.read is not None and not op.was_read:
            op.was_read = True
            op.read()

    def run_one(self) -> bool:
        """Run one operation whose predecessors are done; False if none is in flight."""
        if not self.ops:
            return False
        ready = [op for op in self.ops if all(before.done for before in op.after)]
        self.finish([self.scheduler.choose(ready)])
        return True
