"""What the emulator says no to.

A finding that makes further execution meaningless is raised; one that leaves a defined state (a
race, a leak) is reported to `Findings`, which raises too unless it was told to collect.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One fault: its kind, what happened, and where in the PTX and in the grid."""

    kind: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" + (f" [{self.where}]" if self.where else "")


class EmulationError(Exception):
    """A kernel did something that the machine does not allow."""

    kind = "error"

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(f"{self.kind}: {message}" + (f" [{where}]" if where else ""))
        self.finding = Finding(self.kind, message, where)

    def at(self, where: str) -> "EmulationError":
        """The same error with its place, if it did not have one."""
        return self if self.finding.where else type(self)(self.finding.message, where)


class OutOfBounds(EmulationError):
    kind = "out-of-bounds"


class Misaligned(EmulationError):
    kind = "misaligned"


class UndefinedRead(EmulationError):
    kind = "undefined-read"


class Deadlock(EmulationError):
    kind = "deadlock"


class Livelock(EmulationError):
    kind = "livelock"


class RegisterFault(EmulationError):
    kind = "registers"


class BarrierFault(EmulationError):
    kind = "barrier"


class TmemFault(EmulationError):
    kind = "tmem"


class DescriptorFault(EmulationError):
    kind = "descriptor"


class Race(EmulationError):
    kind = "race"


class LaunchFault(EmulationError):
    kind = "launch"


class UnknownInstruction(EmulationError):
    kind = "unknown-instruction"


class Unmodelled(EmulationError):
    kind = "unmodelled"


@dataclass
class Findings:
    """The findings of a session.

    `collect` keeps going after a reportable one. `strict` makes each read of shared memory that
    nothing wrote a fault; else it yields NaN, since kernels may load rows that they never use.
    `races` watches shared memory for accesses that nothing orders (check/races.py). `fences`
    demands what manuals do and cards do not: tcgen05.fence, tcgen05.wait::ld, commits to CTAs that
    still run, and that who has issued a bulk store waits until it has been read before it ends.
    """

    collect: bool = False
    strict: bool = False
    races: bool = True
    fences: bool = False
    found: list[Finding] = field(default_factory=list)

    def report(self, error: EmulationError) -> None:
        self.found.append(error.finding)
        if not self.collect:
            raise error
