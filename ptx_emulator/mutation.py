"""Seeded faults in a kernel's PTX: does the emulator say no?

A fault edits one place of the text that a cubin stands for; the host code and the cubin stay.
`faults` lists every place at which a kind applies. A fault is caught if a run under some schedule
ends with a finding, or with a result that is wrong.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .findings import EmulationError
from .session import Session

_WAIT = re.compile(r"mbarrier\.try_wait\S*\s+(%?\w+), \[([^\]]+)\], (%\w+)")
_ARRIVE = re.compile(r"mbarrier\.arrive\.(?!expect)")
_EXPECT = re.compile(r"(mbarrier\.arrive\.expect_tx.*, )(%r\d+|\d+);")
_INIT = re.compile(r"(mbarrier\.init\S*\s+\[[^\]]+\], )(%r\d+|\d+);")
_FENCE = re.compile(r"fence\.proxy\.async")
_BARRIER = re.compile(r"bar(rier)?\.sync")
_LOAD = re.compile(r"cp\.async\.bulk\.tensor\S*\.shared::c\S*\s+\[")
_ASYNC_WAIT = re.compile(r"cp\.async\S*\.wait_(group|all)")


@dataclass(frozen=True)
class Fault:
    """One edit: line `line` of the text, counted from 0, becomes `lines`."""

    kind: str
    line: int
    lines: tuple[str, ...]
    extra: tuple[int, ...] = ()  # further lines that go

    def apply(self, ptx: str) -> str:
        """The faulty text, with as many lines as before."""
        text = ptx.split("\n")
        text[self.line] = " ".join(self.lines)
        for other in self.extra:
            text[other] = ""
        return "\n".join(text)


def faults(ptx: str) -> list[Fault]:
    """Every fault that this module knows for a text, in order of the lines."""
    text = ptx.split("\n")
    found = [fault for make in _MAKERS.values() for fault in make(text)]
    return sorted(found, key=lambda fault: fault.line)


# ---- the kinds ----
def _dropped_waits(text: list[str]) -> Iterator[Fault]:
    """The test of an mbarrier succeeds at once."""
    for at, line in enumerate(text):
        found = _WAIT.search(line)
        if found:
            yield Fault("dropped wait", at, (f"setp.eq.b32 {found[1]}, 0, 0;",))


def _wrong_phases(text: list[str]) -> Iterator[Fault]:
    """The wait is for the other parity."""
    for at, line in enumerate(text):
        found = _WAIT.search(line)
        if found:
            scratch = f"{{ .reg .b32 %wrong; add.u32 %wrong, {found[3]}, 1; "
            yield Fault("wrong phase", at, (scratch + line.replace(found[3], "%wrong") + " }",))


def _dropped(kind: str, pattern: re.Pattern[str]) -> Callable[[list[str]], Iterator[Fault]]:
    def make(text: list[str]) -> Iterator[Fault]:
        for at, line in enumerate(text):
            if pattern.search(line):
                yield Fault(kind, at, ("",))

    return make


def _changed(
    kind: str, pattern: re.Pattern[str], change: int
) -> Callable[[list[str]], Iterator[Fault]]:
    """The last operand, a number or a register that holds one, is off by `change`."""

    def make(text: list[str]) -> Iterator[Fault]:
        constants = _constants(text)
        for at, line in enumerate(text):
            found = pattern.search(line)
            if found and (number := constants.get(found[2], found[2])).isdigit():
                new = found[1] + str(max(0, int(number) + change)) + ";"
                yield Fault(kind, at, (line.replace(found[0], new),))

    return make


def _constants(text: list[str]) -> dict[str, str]:
    """Registers that a mov sets to a number. (PTX from the compiler writes a register once.)"""
    found = (re.search(r"mov\.b32\s+(%r\d+), (\d+);", line) for line in text)
    return {match[1]: match[2] for match in found if match}


def _early_arrivals(text: list[str]) -> Iterator[Fault]:
    """A slot is released before the loads from it that stand in front of the release."""
    constants = _constants(text)
    for at, line in enumerate(text):
        if not _ARRIVE.search(line):
            continue
        for before in range(at - 1, 0, -1):
            if _WAIT.search(text[before]):
                break
            if "ldmatrix" in text[before]:
                early = re.sub(r"%r\d+(?=;)", lambda m: constants.get(m[0], m[0]), line.strip())
                yield _moved(text, at, _first_load(text, before), early)
                break


def _moved(text: list[str], at: int, first: int, arrive: str) -> Fault:
    """The arrival of line `at`, which one lane makes, in front of line `first`."""
    for guard in range(at - 1, max(0, at - 4), -1):
        skip = re.search(r"@(%p\d+) bra", text[guard])
        if skip:
            arrive = f"@!{skip[1]} {arrive}"
            break
    return Fault("swapped order", first, (arrive, text[first]), (at,))


def _first_load(text: list[str], at: int) -> int:
    """The first of the loads between the label before `at` and `at`."""
    first = at
    while at > 0 and not text[at].startswith("$L"):
        first = at if "ldmatrix" in text[at] else first
        at -= 1
    return first


_MAKERS: dict[str, Callable[[list[str]], Iterator[Fault]]] = {
    "dropped wait": _dropped_waits,
    "wrong phase": _wrong_phases,
    "dropped arrive": _dropped("dropped arrive", _ARRIVE),
    "dropped expect_tx": _dropped("dropped expect_tx", _EXPECT),
    "dropped init": _dropped("dropped init", _INIT),
    "dropped proxy fence": _dropped("dropped proxy fence", _FENCE),
    "dropped bar.sync": _dropped("dropped bar.sync", _BARRIER),
    "dropped load": _dropped("dropped load", _LOAD),
    "dropped async wait": _dropped("dropped async wait", _ASYNC_WAIT),
    "tx bytes too many": _changed("tx bytes too many", _EXPECT, 128),
    "tx bytes too few": _changed("tx bytes too few", _EXPECT, -128),
    "count too high": _changed("count too high", _INIT, 1),
    "count too low": _changed("count too low", _INIT, -1),
    "swapped order": _early_arrivals,
}
KINDS = tuple(_MAKERS)


# ---- running them ----
@contextmanager
def planted(emulator: Session, ptx: str, fault: Fault) -> Iterator[None]:
    """While this lasts, `ptx` runs with the fault."""
    keys = [key for key, text in emulator.host.ptx_of.items() if text == ptx]
    for key in keys:
        emulator.host.ptx_of[key] = fault.apply(ptx)
    try:
        yield
    finally:
        for key in keys:
            emulator.host.ptx_of[key] = ptx


def verdict(run: Callable[[], bool]) -> str:
    """What a run said: the kind of its finding, "wrong result", or "" if it noticed nothing."""
    try:
        return "" if run() else "wrong result"
    except EmulationError as error:
        return error.kind
