"""Seeded faults in a kernel's PTX: does the emulator say no?

A fault edits one place of the text that a cubin stands for; the host code and the cubin stay.
`faults` lists every place at which a kind applies. A fault is caught if a run under some schedule
ends with a finding, or with a result that is wrong. `python -m ptx_emulator.cli.faults` runs them.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .findings import EmulationError
from .session import Session

_WAIT = re.compile(r"mbarrier\.try_wait\S*\s+(%?\w+), \[([^\]]+)\], (%\w+)")
_ARRIVE = re.compile(r"mbarrier\.arrive\.(?!expect)|\bbar(rier)?\.arrive")
_COMMIT = re.compile(r"tcgen05\.commit|wgmma\.commit|cp\.async(\.bulk)?\.commit_group")
_EXPECT = re.compile(r"(mbarrier\.arrive\.expect_tx.*, )(%r\d+|\d+);")
_INIT = re.compile(r"(mbarrier\.init\S*\s+\[[^\]]+\], )(%r\d+|\d+);")
_FENCE = re.compile(r"fence\.proxy\.async")
_INIT_FENCE = re.compile(r"fence\.mbarrier_init")
_CLUSTER_BARRIER = re.compile(r"barrier\.cluster\.(arrive|wait)")
_MMA_FENCE = re.compile(r"tcgen05\.fence|wgmma\.fence")
_BARRIER = re.compile(r"\bbar(rier)?\.sync")
_LOAD = re.compile(r"cp\.async\.bulk\.tensor\S*\.shared::c\S*\s+\[")
_ASYNC_WAIT = re.compile(r"cp\.async\S*\.wait_(group|all)|wgmma\.wait_group")
_TMEM_WAIT = re.compile(r"tcgen05\.wait")
_DEALLOC = re.compile(r"tcgen05\.dealloc")
_SIGNAL = re.compile(rf"{_ARRIVE.pattern}|tcgen05\.commit")
_ORDERED = re.compile(
    rf"{_FENCE.pattern}|{_MMA_FENCE.pattern}|{_ASYNC_WAIT.pattern}|{_TMEM_WAIT.pattern}"
)
_ACCESS = re.compile(
    r"ldmatrix|stmatrix|tcgen05\.(ld|st)\.|[sl][td]\.shared|tcgen05\.mma\.|wgmma\.mma"
)


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


def sample(found: Sequence[Fault], per_kind: int, seed: int = 0) -> list[Fault]:
    """At most `per_kind` of each kind, drawn by `seed`, in order of the lines."""
    taken = []
    for kind in KINDS:
        places = [fault for fault in found if fault.kind == kind]
        draw = random.Random(f"{seed} {kind}")
        taken += places if len(places) <= per_kind else draw.sample(places, per_kind)
    return sorted(taken, key=lambda fault: fault.line)


# ---- dropped ----
Maker = Callable[[list[str]], Iterator[Fault]]


def _dropped(kind: str, pattern: re.Pattern[str]) -> Maker:
    def make(text: list[str]) -> Iterator[Fault]:
        for at, line in enumerate(text):
            if pattern.search(line):
                yield Fault(kind, at, ("",))

    return make


def _dropped_cluster_barriers(text: list[str]) -> Iterator[Fault]:
    """An arrival at a cluster's barrier and the wait that follows it."""
    for at, line in enumerate(text[:-1]):
        if _CLUSTER_BARRIER.search(line) and _CLUSTER_BARRIER.search(text[at + 1]):
            yield Fault("dropped cluster barrier", at, ("",), (at + 1,))


def _commits_to_one(text: list[str]) -> Iterator[Fault]:
    """A commit that tells one CTA of those that it should tell, rank 0 or rank 1."""
    pattern = re.compile(r"(tcgen05\.commit\S*multicast\S*\s+\[[^\]]+\], )(%rs\d+);")
    for at, line in enumerate(text):
        found = pattern.search(line)
        if not found:
            continue
        for mask in (1, 2):
            scratch = f"{{ .reg .b16 %few; mov.b16 %few, {mask}; "
            yield Fault("commit to one CTA", at, (scratch, f"{found[1]}%few; }}"))


def _dropped_waits(text: list[str]) -> Iterator[Fault]:
    """The test of an mbarrier succeeds at once."""
    for at, line in enumerate(text):
        found = _WAIT.search(line)
        if found:
            yield Fault("dropped wait", at, (f"setp.eq.b32 {found[1]}, 0, 0;",))


# ---- values that are off ----
def _wrong_phases(text: list[str]) -> Iterator[Fault]:
    """The wait is for the other parity."""
    for at, line in enumerate(text):
        found = _WAIT.search(line)
        if found:
            scratch = f"{{ .reg .b32 %wrong; add.u32 %wrong, {found[3]}, 1; "
            wait = re.sub(rf"{re.escape(found[3])}(?!\d)", "%wrong", line[found.start() :])
            yield Fault("wrong phase", at, (scratch, line[: found.start()] + wait + " }"))


def _changed(kind: str, pattern: re.Pattern[str], change: int) -> Maker:
    """The last operand, a number or a register that holds one, is off by `change`."""

    def make(text: list[str]) -> Iterator[Fault]:
        constants = _constants(text)
        for at, line in enumerate(text):
            found = pattern.search(line)
            if found and (number := constants.get(found[2], found[2])).isdigit():
                new = found[1] + str(max(0, int(number) + change)) + ";"
                yield Fault(kind, at, (line.replace(found[0], new),))

    return make


def _replaced(kind: str, pattern: str, new: Callable[[re.Match[str]], str]) -> Maker:
    """What the pattern finds in a line is replaced."""
    expression = re.compile(pattern)

    def make(text: list[str]) -> Iterator[Fault]:
        for at, line in enumerate(text):
            found = expression.search(line)
            if found:
                yield Fault(kind, at, (line[: found.start()] + new(found) + line[found.end() :],))

    return make


def _further(found: re.Match[str], step: int) -> str:
    """The address `[register+offset]` that ends a match, `step` further."""
    return f"{found[1]}[{found[2]}+{int(found[3] or '0', 0) + step}]"


def _constants(text: list[str]) -> dict[str, str]:
    """Registers that a mov sets to a number. (PTX from the compiler writes a register once.)"""
    found = (re.search(r"mov\.b32\s+(%r\d+), (\d+);", line) for line in text)
    return {match[1]: match[2] for match in found if match}


_PLACE = r"\[(%?\w+)(?: ?\+ ?(\w+))?\]"  # an address
# Descriptors as upstream writes them, and as we do: the upper half of one of shared memory, ...
_HIGH = r"(_hi, |_lo, |%r\d+, |\{lower, )(0x4000[0-9a-f]{4}(?=[;}])|1073[78]\d{5}(?=\}))"
# ... the way to a later step in its lower half, and that of the instruction.
_STEP = r"(add\.[su]32 (?:smem_desc_\w+, \w+|lower, \S+), )(0x[0-9a-f]+|\d+)(?=;)"
_IDESC = r"(mov\.b32 \w*idesc, |tcgen05\.mma\.\S+ \[d\], \S+, b, )(0x[0-9a-f]+|\d+)"


def _used(make: Maker) -> Maker:
    """Faults in names that a later line reads."""

    def some(text: list[str]) -> Iterator[Fault]:
        for fault in make(text):
            name = re.search(r"mov\.b32 (\w+), ", text[fault.line])
            if not name or any(re.search(rf"tcgen05\.mma.*\b{name[1]}\b", t) for t in text):
                yield fault

    return some


def _flipped(bits: int) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{hex(int(found[2], 0) ^ bits)}"


def _plus(number: int) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{hex(int(found[2], 0) + number)}"


def _coordinates(text: list[str]) -> Iterator[Fault]:
    """A TMA copy of the box one row further."""
    pattern = re.compile(r"(@!?%p\d+ )?(cp\.async\.bulk\.tensor.*\{[^,]+, )(%r\d+)(.*)")
    for at, line in enumerate(text):
        found = pattern.search(line)
        if found:
            scratch = f"{{ .reg .b32 %wrong; add.s32 %wrong, {found[3]}, 1; "
            copy = f"{found[1] or ''}{found[2]}%wrong{found[4]} }}"
            yield Fault("coordinate off by one", at, (scratch, copy))


def _swizzles(text: list[str]) -> Iterator[Fault]:
    """Addresses that the kernel swizzles itself: XOR with the wrong bits of the row."""
    for at, line in enumerate(text[:-1]):
        shift = re.search(r"shr\.u32\s+(%r\d+), %r\d+, (\d);", line)
        if shift and re.search(rf"and\.b32\s+%r\d+, {shift[1]}, (112|48|16);", text[at + 1]):
            wrong = line.replace(f", {shift[2]};", f", {int(shift[2]) + 1};")
            yield Fault("swizzle off by one", at, (wrong,))


# ---- order ----
def _early_signals(text: list[str]) -> Iterator[Fault]:
    """An arrival or a commit in front of the accesses that it tells of."""
    constants = _constants(text)
    for at, line in enumerate(text):
        if not _SIGNAL.search(line):
            continue
        for before in range(at - 1, 0, -1):
            if _WAIT.search(text[before]) or _SIGNAL.search(text[before]):
                break
            if _ACCESS.search(text[before]):
                early = re.sub(r"%r\d+(?=;)", lambda m: constants.get(m[0], m[0]), line.strip())
                first = _first_access(text, before)
                if not _defined_between(text, first, at, early):
                    yield _moved(text, at, first, early)
                break


def _first_access(text: list[str], at: int) -> int:
    """The first of the accesses between the label before `at` and `at`."""
    first = at
    while at > 0 and not text[at].startswith("$L") and not _WAIT.search(text[at]):
        first = at if _ACCESS.search(text[at]) else first
        at -= 1
    return first


def _defined_between(text: list[str], first: int, last: int, line: str) -> bool:
    """Whether a register that `line` reads gets its value in lines `first` .. `last`."""
    needed = set(re.findall(r"%r\d+", line.split("[", 1)[-1]))
    written = (re.search(r"\s(%r\d+)", other) for other in text[first:last])
    return bool(needed & {found[1] for found in written if found})


def _moved(text: list[str], at: int, first: int, signal: str) -> Fault:
    """The signal of line `at`, which one lane gives, in front of line `first`."""
    guard = re.match(r"\s*(@!?\w+) ", text[first])
    skips = (re.search(r"@(%p\d+) bra", text[back]) for back in range(at - 1, max(0, at - 8), -1))
    skip = next((found for found in skips if found), None)
    if guard and skip:
        signal = f"{guard[1]} {signal}"  # the product's leader gives the commit
    elif skip and not _defined_between(text, first, at, skip[1].replace("%p", "%r")):
        signal = f"@!{skip[1]} {signal}"
    return Fault("swapped order", first, (signal, text[first]), (at,))


def _late_waits(text: list[str]) -> Iterator[Fault]:
    """A wait or a fence behind the signal or barrier that follows it."""
    for at, line in enumerate(text):
        if not _ORDERED.search(line):
            continue
        for after in range(at + 1, min(at + 16, len(text))):
            if _SIGNAL.search(text[after]) or _BARRIER.search(text[after]):
                skipped = any(re.search(r"@%p\d+ bra", other) for other in text[at:after])
                labels = (n for n in range(after, after + 6) if text[n].startswith("$L"))
                end = next(labels, after) if skipped else _last_signal(text, after)
                yield Fault("swapped order", end, (text[end], line.strip()), (at,))
                break
            if _ORDERED.search(text[after]):
                break


def _last_signal(text: list[str], at: int) -> int:
    """The last of the signals that follow each other from line `at` on."""
    while any(_SIGNAL.search(line) for line in text[at + 1 : at + 2]):
        at += 1
    return at


def _swapped(text: list[str]) -> Iterator[Fault]:
    yield from _early_signals(text)
    yield from _late_waits(text)


_MAKERS: dict[str, Maker] = {
    "dropped wait": _dropped_waits,
    "wrong phase": _wrong_phases,
    "dropped arrive": _dropped("dropped arrive", _ARRIVE),
    "dropped commit": _dropped("dropped commit", _COMMIT),
    "dropped expect_tx": _dropped("dropped expect_tx", _EXPECT),
    "dropped init": _dropped("dropped init", _INIT),
    "dropped init fence": _dropped("dropped init fence", _INIT_FENCE),
    "dropped proxy fence": _dropped("dropped proxy fence", _FENCE),
    "dropped mma fence": _dropped("dropped mma fence", _MMA_FENCE),
    "dropped bar.sync": _dropped("dropped bar.sync", _BARRIER),
    "dropped cluster barrier": _dropped_cluster_barriers,
    "commit to one CTA": _commits_to_one,
    "wrong CTA": _replaced(
        "wrong CTA", r"(mapa\.shared::cluster\S*\s+%r\d+, %r\d+, )0;", lambda m: f"{m[1]}1;"
    ),
    "dropped load": _dropped("dropped load", _LOAD),
    "dropped async wait": _dropped("dropped async wait", _ASYNC_WAIT),
    "dropped tcgen05.wait": _dropped("dropped tcgen05.wait", _TMEM_WAIT),
    "dropped dealloc": _dropped("dropped dealloc", _DEALLOC),
    "tx bytes too many": _changed("tx bytes too many", _EXPECT, 128),
    "tx bytes too few": _changed("tx bytes too few", _EXPECT, -128),
    "count too high": _changed("count too high", _INIT, 1),
    "count too low": _changed("count too low", _INIT, -1),
    "wrong barrier": _replaced(
        "wrong barrier",
        rf"((?:mbarrier\.(?:try_wait|arrive)|tcgen05\.commit)[^\[]*){_PLACE}",
        lambda found: _further(found, 8),
    ),
    "async wait for too few": _replaced(
        "async wait for too few", r"(wait_group\S*\s+)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}"
    ),
    "tmem column off by one": _replaced(
        "tmem column off by one",
        rf"(tcgen05\.(?:ld|st)\.[^\[]*){_PLACE}",
        lambda found: _further(found, 1),
    ),
    "accumulator column off by one": _replaced(
        "accumulator column off by one",
        rf"(tcgen05\.mma\.[^\[]*){_PLACE}",
        lambda found: _further(found, 1),
    ),
    "descriptor stride off by one": _replaced("descriptor stride off by one", _HIGH, _plus(1)),
    "descriptor swizzle": _replaced("descriptor swizzle", _HIGH, _flipped(0xC0000000)),
    "descriptor address off by one": _replaced("descriptor address off by one", _STEP, _plus(1)),
    "instruction N off by one": _used(
        _replaced("instruction N off by one", _IDESC, _plus(-1 << 17))
    ),
    "instruction M off by one": _used(
        _replaced("instruction M off by one", _IDESC, _plus(-1 << 24))
    ),
    "instruction type": _used(_replaced("instruction type", _IDESC, _flipped(1 << 7))),
    "instruction transpose": _used(_replaced("instruction transpose", _IDESC, _flipped(1 << 16))),
    "coordinate off by one": _coordinates,
    "swizzle off by one": _swizzles,
    "swapped order": _swapped,
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
