"""Which wgmma reads or writes registers that something else wrote, with no wgmma.fence between.

The PTX manual demands the fence before the first wgmma and whenever an accumulator or a fragment of
A was changed since. A product's own results, moved or not, need none. Found in the flow graph, so
whatever way a run takes: for each register, whether some way leads to it unfenced.
"""

from ..ptx.flow import Flow, destinations, registers
from ..ptx.syntax import Instruction, Reg

Dirty = frozenset[int]


def is_product(instruction: Instruction) -> bool:
    return instruction.opcode == "wgmma" and instruction.has("mma_async")


def operands_of(instruction: Instruction) -> list[Reg]:
    """The registers that a product reads or writes while it runs: D, and A if it is a fragment."""
    d, a = instruction.operands[:2]
    fragment = [] if isinstance(a, Reg) else list(registers(a))  # else a descriptor
    return [*registers(d), *fragment]


def step(dirty: set[int], instruction: Instruction) -> None:
    """Change `dirty`, the registers written since the last fence, by one instruction."""
    if instruction.opcode == "wgmma":
        if instruction.has("fence"):
            dirty.clear()
        elif is_product(instruction):
            dirty.difference_update(reg.index for reg in operands_of(instruction))
        return
    written = destinations(instruction)
    if instruction.opcode == "mov" and len(written) == 1:
        source = instruction.operands[1]
        if isinstance(source, Reg) and source.index not in dirty:
            if instruction.guard is None:
                dirty.discard(written[0].index)
            return
    dirty.update(reg.index for reg in written)


def unfenced(flow: Flow) -> dict[int, str]:
    """By line: the name of a register that a wgmma there uses unfenced."""
    watched = {
        reg.index
        for block in flow.blocks
        for instruction in block.code
        if is_product(instruction)
        for reg in operands_of(instruction)
    }
    if not watched:
        return {}
    names = {reg.index: reg.name for reg in flow.kernel.registers}
    everything = frozenset(names)  # before the first fence nothing is in order
    before: dict[int, Dirty] = {0: everything}
    todo = [0]
    while todo:
        index = todo.pop()
        dirty = set(before[index])
        for instruction in flow.blocks[index].code:
            step(dirty, instruction)
        for target in flow.blocks[index].targets:
            known = before.get(target)
            if target != flow.exit and (known is None or not dirty <= known):
                before[target] = frozenset(dirty) if known is None else known | dirty
                todo.append(target)
    found: dict[int, str] = {}
    for index, start in before.items():
        dirty = set(start)
        for instruction in flow.blocks[index].code:
            if is_product(instruction):
                bad = sorted(r.index for r in operands_of(instruction) if r.index in dirty)
                if bad:
                    found[instruction.line] = names[bad[0]]
            step(dirty, instruction)
    return found
