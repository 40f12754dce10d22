"""Find pipelines whose state does not travel with the loop, in PTX.

The tracer of CuTe DSL picks loop-carried values from the syntax of a loop body. A ring's phase that
it misses stays what it was before the loop (frozen: every wait looks at one phase for ever) or
starts anew at each outer iteration. Both compile, and both are silent wrong code. In PTX they are
waits inside a loop whose parity

    frozen    has literals as its only definitions, or none inside any loop around the wait;
    restarts  is also set to a literal inside a loop around the wait.
"""

import re
from dataclasses import dataclass

LABEL = re.compile(r"^\s*(\$L\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)\s*;")
WAIT = re.compile(r"mbarrier\.(?:try|test)_wait\.parity[.\w:]*\s+[^,]+,\s*\[[^\]]+\],\s*([%\w]+)")
MOVE = re.compile(r"\bmov\.[bus]\d+\s+(%\w+),\s*([%\w-]+)\s*;")
WRITE = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(%r\d+)\s*,")
ENDS = re.compile(r"\s*(?:ret|exit)\s*;")
LITERAL = re.compile(r"-?(?:0x)?\d+$")


@dataclass(frozen=True)
class Suspect:
    """One wait that the lint objects to."""

    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind}: {self.text}"


def find_loops(lines: list[str]) -> list[range]:
    """Line ranges closed by a branch back to a label from which the branch can be reached: code
    that all roles end with may stand in front of what some of them do. Labels of inline assembly do
    not count: a wait spins on its own parity rightly."""
    labels = {m.group(1): n for n, line in enumerate(lines) if (m := LABEL.match(line))}
    loops = []
    for n, line in enumerate(lines):
        match = BRANCH.search(line)
        if match and labels.get(match.group(1), n) < n:
            loop = range(labels[match.group(1)], n + 1)
            if n in reachable(loop.start, lines, labels):
                loops.append(loop)
    return loops


def reachable(start: int, lines: list[str], labels: dict[str, int]) -> set[int]:
    """Lines that can run after line `start`."""
    found: set[int] = set()
    todo = [start]
    while todo:
        n = todo.pop()
        while n < len(lines) and n not in found:
            found.add(n)
            match = BRANCH.search(lines[n])
            if match and match.group(1) in labels:
                todo.append(labels[match.group(1)])
            if ENDS.match(lines[n]) or (match and "@" not in lines[n]):
                break
            n += 1
    return found


def definitions(lines: list[str]) -> dict[str, list[tuple[int, str | None]]]:
    """register -> [(line, what is moved into it, or None for any other instruction)]."""
    found: dict[str, list[tuple[int, str | None]]] = {}
    for n, line in enumerate(lines):
        move = MOVE.search(line)
        if move:
            found.setdefault(move.group(1), []).append((n, move.group(2)))
        elif write := WRITE.match(line):
            found.setdefault(write.group(1), []).append((n, None))
    return found


def origins(register: str, defs: dict, at: int = -1, seen: frozenset = frozenset()) -> list:
    """[(line, is a literal)] of everything that reaches register through moves.

    A register that only literals reach counts where it is copied. A copy of one that other values
    reach too, inside of a loop that carries it, brings no literal there.
    """
    if LITERAL.match(register):
        return [(at, True)]
    if register in seen:
        return []
    found = []
    for line, source in defs.get(register, []):
        if source is None:
            found.append((line, False))
        else:
            reached = origins(source, defs, line, seen | {register})
            only_literals = all(literal for _, literal in reached)
            found += [(line, True) for _ in reached] if only_literals else reached
    return found


def suspects(ptx: str) -> list[Suspect]:
    """Every wait on a frozen or restarting parity."""
    lines = ptx.splitlines()
    loops, defs, found = find_loops(lines), definitions(lines), []
    for n, line in enumerate(lines):
        match = WAIT.search(line)
        around = [loop for loop in loops if n in loop]
        if not match or not around:
            continue
        reached = origins(match.group(1), defs)
        moving = [at for at, literal in reached if not literal and any(at in x for x in around)]
        reset = [at for at, literal in reached if literal and any(at in x for x in around)]
        if not moving:
            found.append(Suspect(n + 1, "frozen", line.strip()))
        elif reset:
            found.append(Suspect(n + 1, "restarts", line.strip()))
    return found
