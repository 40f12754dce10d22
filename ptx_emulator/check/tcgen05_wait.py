"""Which tcgen05.ld fill registers that something uses with no tcgen05.wait::ld between.

The PTX manual demands the wait. Kernels that are right on cards have none, so ptxas must order the
uses, and this is a fault only in sessions with strict="fences". Found in the flow graph, on all
ways that a run may take. Moves are no uses: the compiler puts them where it likes.
"""

from ..ptx.flow import Flow, destinations, sources
from ..ptx.syntax import Instruction

Pending = dict[int, frozenset[int]]  # register: lines of the loads that may be filling it


def is_load(instruction: Instruction) -> bool:
    return instruction.opcode == "tcgen05" and instruction.has("ld")


def step(pending: Pending, instruction: Instruction, found: dict[int, str]) -> None:
    """Change `pending` by one instruction, and note the loads that it does not wait for."""
    if instruction.opcode == "tcgen05" and instruction.has("wait::ld"):
        pending.clear()
        return
    used = {line: reg.name for reg in sources(instruction) for line in pending.get(reg.index, ())}
    if instruction.opcode != "mov":
        found.update(used)
        used = {instruction.line: ""} if is_load(instruction) else {}
    for reg in destinations(instruction):
        pending.pop(reg.index, None)
        if used:
            pending[reg.index] = frozenset(used)


def unawaited(flow: Flow) -> dict[int, str]:
    """By line of a tcgen05.ld: the name of a register that is used before a wait."""
    found: dict[int, str] = {}
    if not any(is_load(instruction) for block in flow.blocks for instruction in block.code):
        return found
    before: dict[int, Pending] = {0: {}}
    todo = [0]
    while todo:
        index = todo.pop()
        pending = dict(before[index])
        for instruction in flow.blocks[index].code:
            step(pending, instruction, found)
        for target in flow.blocks[index].targets:
            if target == flow.exit:
                continue
            known = before.get(target)
            merged = dict(known or {})
            for register, lines in pending.items():
                merged[register] = merged.get(register, frozenset()) | lines
            if known is None or merged != known:
                before[target] = merged
                todo.append(target)
    return found
