"""Basic blocks, reconvergence points and liveness of a kernel.

A block ends at a branch, before a label, and after an instruction at which a warp may have to wait,
so that a waiting warp resumes at the start of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..words import words
from .syntax import Address, Instruction, Kernel, Not, Operand, Pair, Reg, Symbol, Vector

_NO_DESTINATION = frozenset(
    words(
        "st red bar barrier cp fence membar bra brx ret exit trap setmaxnreg prefetch "
        "prefetchu nanosleep griddepcontrol discard applypriority stmatrix brkpt pmevent"
    )
)


@dataclass(slots=True)
class Block:
    """Straight-line code. `targets` are block numbers: (next,), or (taken, not taken)."""

    index: int
    code: list[Instruction]
    branch: Instruction | None = None
    targets: tuple[int, ...] = ()
    reconverge: int = -1
    waits: bool = False  # its last instruction may have to wait
    signals: bool = False  # ends with an instruction that tells others something
    spins: bool = False  # a loop around an mbarrier test and nothing else
    region_waits: bool = False  # something between its branch and the reconvergence point waits
    live_in: frozenset[int] = frozenset()
    live_out: frozenset[int] = frozenset()
    line: int = 0


@dataclass(slots=True)
class Flow:
    """The control-flow graph; block number len(blocks) is the exit."""

    kernel: Kernel
    blocks: list[Block] = field(default_factory=list)

    @property
    def exit(self) -> int:
        return len(self.blocks)


def may_wait(instruction: Instruction) -> bool:
    """Whether a warp may stop at this instruction until another agent acts."""
    name, has = instruction.opcode, instruction.has
    if name in ("bar", "barrier"):
        if has("cluster"):
            return has("wait")
        return has("sync", "red") and not has("warp")
    if name == "tcgen05":
        return has("alloc")
    if name == "setmaxnreg":
        return has("inc")
    return name == "griddepcontrol" and has("wait")


def destinations(instruction: Instruction) -> list[Reg]:
    """Registers that the instruction writes."""
    if not instruction.operands or instruction.opcode in _NO_DESTINATION:
        return []
    if instruction.opcode == "tcgen05" and not instruction.has("ld"):
        return []
    first = instruction.operands[0]
    if instruction.opcode == "tcgen05" and instruction.has("red"):  # the values, their maximum
        return [*registers(first), *registers(instruction.operands[1])]
    return [] if isinstance(first, Address) else list(registers(first))


def sources(instruction: Instruction) -> list[Reg]:
    """Registers that the instruction reads, its guard included."""
    found = [] if instruction.guard is None else [instruction.guard]
    written = destinations(instruction)
    skip = bool(written) or (bool(instruction.operands) and instruction.operands[0] is None)
    if instruction.opcode == "wgmma" or (instruction.opcode == "mma" and instruction.has("sp")):
        skip = False
    for operand in instruction.operands[1 if skip else 0 :]:
        found.extend(registers(operand))
    return found


def registers(operand: Operand | None) -> Iterator[Reg]:
    """All registers in an operand."""
    match operand:
        case Reg():
            yield operand
        case Not(reg):
            yield reg
        case Vector(items):
            for item in items:
                yield from registers(item)
        case Pair(first, second):
            yield from registers(first)
            yield from registers(second)
        case Address(base, _, coords):
            yield from registers(base)
            for coord in coords:
                yield from registers(coord)


def signals(instruction: Instruction) -> bool:
    """Whether others may go on because of it: a schedule may pause a warp behind it."""
    name, has = instruction.opcode, instruction.has
    if name in ("mbarrier", "bar", "barrier"):
        return has("arrive")
    return name == "tcgen05" and has("commit")


def analyse(kernel: Kernel) -> Flow:
    """The flow graph of a kernel."""
    flow = Flow(kernel, _cut(kernel))
    _thread_jumps(flow)
    for block in flow.blocks:
        block.spins = _is_spin(block)
    _post_dominators(flow)
    for block in flow.blocks:
        if len(block.targets) == 2:
            block.region_waits = _region_waits(flow, block)
    _liveness(flow)
    return flow


def _cut(kernel: Kernel) -> list[Block]:
    code = kernel.code
    leaders = {0, *kernel.labels.values()}
    for at, instruction in enumerate(code):
        if may_wait(instruction):  # alone in its block: a warp that waited starts it again
            leaders.update((at, at + 1))
        elif instruction.opcode in ("bra", "ret", "exit") or signals(instruction):
            leaders.add(at + 1)
    starts = sorted(at for at in leaders if at < len(code))
    number = {start: index for index, start in enumerate(starts)}
    blocks = []
    for index, start in enumerate(starts):
        stop = starts[index + 1] if index + 1 < len(starts) else len(code)
        body = code[start:stop]
        block = Block(index, body, line=body[0].line)
        last, after = body[-1], number.get(stop, len(starts))
        if last.opcode in ("bra", "ret", "exit"):
            goal = len(starts)
            if last.opcode == "bra":
                symbol = last.operands[0]
                assert isinstance(symbol, Symbol)
                goal = number.get(kernel.labels[symbol.name], len(starts))
            block.code = body[:-1]
            block.branch = last if last.guard is not None else None
            block.targets = (goal,) if last.guard is None else (goal, after)
        else:
            block.waits, block.signals = may_wait(last), signals(last)
            block.targets = (after,)
        blocks.append(block)
    return blocks


def _thread_jumps(flow: Flow) -> None:
    """Let branches to an empty block go where it goes."""

    def final(index: int) -> int:
        for _ in flow.blocks:
            if index == flow.exit:
                break
            block = flow.blocks[index]
            if block.code or len(block.targets) != 1:
                break
            index = block.targets[0]
        return index

    for block in flow.blocks:
        block.targets = tuple(final(target) for target in block.targets)


def _is_spin(block: Block) -> bool:
    """Whether the block repeats itself until a barrier's phase is over, and does nothing else."""
    if len(block.targets) != 2 or block.index not in block.targets:
        return False
    quiet = {"mbarrier", "setp", "selp", "mov", "not", "nanosleep", "add", "and", "cvt"}
    waits = [i for i in block.code if i.opcode == "mbarrier" and i.has("try_wait", "test_wait")]
    return bool(waits) and all(i.opcode in quiet for i in block.code) and len(block.code) <= 8


def _post_dominators(flow: Flow) -> None:
    """Set `reconverge` to the immediate post-dominator (Cooper, Harvey, Kennedy 2001)."""
    exit_ = flow.exit
    before: list[list[int]] = [[] for _ in range(exit_ + 1)]
    for block in flow.blocks:
        for target in block.targets:
            before[target].append(block.index)
    order: list[int] = []  # post-order of the reversed graph
    seen, stack = {exit_}, [(exit_, iter(before[exit_]))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(before[following])))
    rank = {node: at for at, node in enumerate(order)}
    above = {exit_: exit_}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [t for t in flow.blocks[node].targets if t in above]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while rank[best] < rank[other]:
                        best = above[best]
                    while rank[other] < rank[best]:
                        other = above[other]
            if above.get(node) != best:
                above[node] = best
                changed = True
    for block in flow.blocks:
        block.reconverge = above.get(block.index, exit_)


def _region_waits(flow: Flow, block: Block) -> bool:
    if block.reconverge == flow.exit:
        return True
    seen = {block.reconverge}
    todo = [t for t in block.targets if t not in seen]
    while todo:
        index = todo.pop()
        if index in seen:
            continue
        seen.add(index)
        inner = flow.blocks[index]
        if inner.waits or inner.spins:
            return True
        if any(i.opcode == "ld" and i.has("acquire", "volatile") for i in inner.code):
            return True
        todo.extend(t for t in inner.targets if t not in seen)
    return False


def _liveness(flow: Flow) -> None:
    gen: list[set[int]] = []
    kill: list[set[int]] = []
    for block in flow.blocks:
        used: set[int] = set()
        written: set[int] = set()
        for instruction in block.code:
            used.update(r.index for r in sources(instruction) if r.index not in written)
            for reg in destinations(instruction):
                if instruction.guard is None:
                    written.add(reg.index)
                elif reg.index not in written:
                    used.add(reg.index)
        if block.branch is not None and block.branch.guard is not None:
            guard = block.branch.guard.index
            if guard not in written:
                used.add(guard)
        gen.append(used)
        kill.append(written)
    live_in: list[set[int]] = [set() for _ in range(flow.exit + 1)]
    changed = True
    while changed:
        changed = False
        for block in reversed(flow.blocks):
            out = set().union(*(live_in[target] for target in block.targets))
            entering = gen[block.index] | (out - kill[block.index])
            if entering != live_in[block.index]:
                live_in[block.index] = entering
                changed = True
    for block in flow.blocks:
        block.live_in = frozenset(live_in[block.index])
        block.live_out = frozenset(set().union(*(live_in[t] for t in block.targets)))
