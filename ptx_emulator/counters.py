"""What each warp role of a launch issued: slots by pipe, bytes, waits; as JSON and as a table.

A slot is one instruction of one warp, added up over the CTAs of the launch. Pipes are told by the
opcode, so a slot is what the PTX asks for; ptxas may fuse or split instructions. Bytes of shared
and tensor memory are those of whole warps, whatever their masks.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .ptx.program import Program
from .ptx.syntax import Address, Imm, Instruction, Vector

if TYPE_CHECKING:
    from .machine.machine import Machine

PIPES = ("tensor", "mufu", "fma", "alu", "lsu", "tma", "barrier", "other")
MEMORIES = ("shared", "tmem", "tma")

_TENSOR = frozenset({"mma", "wgmma"})
_MUFU = frozenset({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"})
_FLOAT = frozenset({"fma", "mul", "add", "sub", "mad"})
_MEMORY = frozenset({"ld", "st", "ldmatrix", "stmatrix", "atom", "red", "shfl", "prefetch"})
_BARRIER = frozenset({"mbarrier", "bar", "barrier", "fence", "membar"})
_OTHER = frozenset(
    {"bra", "brx", "ret", "exit", "elect", "setmaxnreg", "griddepcontrol", "mov", "cvta"}
)
_WAITS = frozenset({"try_wait", "test_wait", "wait_group", "wait_all", "wait", "sync"})


def pipe_of(instruction: Instruction) -> str:
    """The pipe that issues an instruction; integer products go to the FMA pipe."""
    name = instruction.opcode
    if name in _TENSOR or (name == "tcgen05" and instruction.has("mma")):
        return "barrier" if instruction.has("fence", "commit_group", "wait_group") else "tensor"
    if name in _MUFU:
        return "mufu"
    if name == "cp":
        return "tma" if instruction.has("bulk") else "lsu"
    if name == "tcgen05":
        return "lsu" if instruction.has("ld", "st", "cp") else "barrier"
    if name in _MEMORY:
        return "lsu"
    if name in _BARRIER:
        return "barrier"
    if name in _OTHER:
        return "other"
    if name in ("mul", "mad") or name.startswith("mad"):
        return "fma"
    floating = instruction.type.startswith(("f16", "f32", "bf16", "f64"))
    return "fma" if name in _FLOAT and floating else "alu"


def waits(instruction: Instruction) -> int:
    """1 for an instruction that may have to wait for others, else 0."""
    synchronises = instruction.opcode in ("mbarrier", "bar", "barrier", "wgmma", "cp", "tcgen05")
    return int(synchronises and instruction.has(*_WAITS) and not instruction.has("mma_async"))


def shared_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that a warp moves, operands of wgmma included."""
    name = instruction.opcode
    if name in ("ldmatrix", "stmatrix"):
        return 128 * _registers(instruction)
    if name == "cp" and instruction.mods[:1] == ("async",) and len(instruction.operands) > 2:
        size = instruction.operands[2]
        return 32 * size.value if isinstance(size, Imm) and not instruction.has("bulk") else 0
    if name == "wgmma" and instruction.has("mma_async"):
        columns, deep = (int(x) for x in instruction.mods[3][4:].split("k"))
        rows = 0 if isinstance(instruction.operands[1], Vector) else 64
        width = 1 if instruction.mods[-1] in ("e4m3", "e5m2", "s8", "u8") else 2
        return (columns + rows) * deep * width // 4  # a warp's part
    if name in ("ld", "st", "atom", "red") and any(
        m.startswith("shared") for m in instruction.mods
    ):
        width = int(instruction.type.lstrip("bufsx") or 32)
        return 32 * width // 8 * _registers(instruction)
    return 0


def tmem_bytes(instruction: Instruction) -> int:
    """Bytes of tensor memory that tcgen05.ld or st moves for a warp."""
    moves = instruction.opcode == "tcgen05" and instruction.mods[0] in ("ld", "st")
    return 128 * _registers(instruction) if moves else 0


def _registers(instruction: Instruction) -> int:
    """Registers that a load or store names."""
    for operand in instruction.operands:
        if isinstance(operand, Vector):
            return len(operand.items)
    return 1


def _loads(instruction: Instruction) -> int:
    """1 for a TMA copy into shared memory."""
    copies = instruction.opcode == "cp" and instruction.has("bulk")
    first = instruction.operands[0] if instruction.operands else None
    spaces = [m for m in instruction.mods if m.startswith(("shared", "global"))]
    into_shared = bool(spaces) and spaces[0].startswith("shared")
    return int(copies and into_shared and isinstance(first, Address))


def _issues_to(pipe: str) -> Callable[[Instruction], int]:
    return lambda instruction: int(pipe_of(instruction) == pipe)


_COLUMNS: dict[str, Callable[[Instruction], int]] = {
    **{pipe: _issues_to(pipe) for pipe in PIPES},
    "shared": shared_bytes,
    "tmem": tmem_bytes,
    "waits": waits,
    "loads": _loads,
}


@dataclass(frozen=True)
class Role:
    """Warps of a CTA that run the same code, and what all of them did in all CTAs."""

    name: str
    warps: list[int]
    slots: dict[str, int]
    bytes: dict[str, int] = field(default_factory=dict)
    waits: int = 0  # instructions that may wait
    blocked: int = 0  # how often a warp did, in this schedule


def by_warp(program: Program, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """Each column for each warp, from (blocks, warps) counts of how often a block was begun."""
    names = list(_COLUMNS)
    table = np.zeros((len(program.flow.blocks), len(names)), np.int64)
    for block in program.flow.blocks:
        for instruction in block.code:
            table[block.index] += [_COLUMNS[name](instruction) for name in names]
        table[block.index, names.index("other")] += len(block.targets) == 2
    totals = blocks[: len(table)].T @ table
    return {name: totals[:, index] for index, name in enumerate(names)}


FEW = 0.05  # of the most that a warp issues to the MUFU: a correction, not a softmax
ALIKE = 0.6  # share of their code that warps of one role have in common


def groups(program: Program, blocks: np.ndarray) -> list[list[int]]:
    """Warps by the code that they ran, whatever each did of it how often."""
    sizes = np.array([len(block.code) + 1 for block in program.flow.blocks])
    ran = blocks[: len(sizes)] > 0
    found: list[list[int]] = []
    for warp in range(ran.shape[1]):
        for group in found:
            first = ran[:, group[0]]
            union = sizes[first | ran[:, warp]].sum()
            if sizes[first & ran[:, warp]].sum() >= ALIKE * union:
                group.append(warp)
                break
        else:
            found.append([warp])
    return found


def roles(machine: "Machine") -> list[Role]:
    """The roles of a launch that has ended."""
    columns = by_warp(machine.program, machine.warp_counts)
    columns["shared"] = columns["shared"] + machine.traffic["shared"]
    columns["tmem"] = columns["tmem"] + machine.traffic["tmem"]
    columns["moved by tma"] = machine.traffic["tma"]
    found = []
    most = columns["mufu"].max(initial=0)
    for group in groups(machine.program, machine.warp_counts):
        total = {name: int(column[group].sum()) for name, column in columns.items()}
        exponentials = columns["mufu"][group].max() > FEW * most
        found.append(
            Role(
                _name(total, exponentials),
                group,
                {pipe: total[pipe] for pipe in PIPES},
                {"shared": total["shared"], "tmem": total["tmem"], "tma": total["moved by tma"]},
                total["waits"],
                int(machine.times_blocked[group].sum()),
            )
        )
    return _numbered(found)


def _name(total: dict[str, int], exponentials: bool) -> str:
    """What a role does, from what it issued."""
    if total["tensor"]:
        return "compute" if exponentials else "mma"
    if exponentials and not total["loads"]:
        return "softmax"
    if total["loads"]:
        return "load"
    if total["tmem"]:
        return "correction"
    return "store" if total["tma"] else "other"


def _numbered(found: list[Role]) -> list[Role]:
    """Roles of the same kind get numbers, so that each name is one role's."""
    kinds, seen, result = Counter(role.name for role in found), Counter[str](), []
    for role in found:
        name = role.name if kinds[role.name] == 1 else f"{role.name} {seen[role.name]}"
        seen[role.name] += 1
        result.append(Role(**{**asdict(role), "name": name}))
    return result


def as_dicts(found: list[Role]) -> list[dict]:
    """For JSON."""
    return [asdict(role) for role in found]


def as_table(found: list[Role], tiles: float = 1.0) -> str:
    """For people: slots and KiB of each role, divided by `tiles`."""
    heads = [*PIPES, *(f"{memory} KiB" for memory in MEMORIES), "waits", "blocked"]
    lines = [f"{'role':14s}{'warps':>8s}" + "".join(f"{head:>11s}" for head in heads)]
    for role in found:
        span = f"{role.warps[0]}-{role.warps[-1]}" if len(role.warps) > 1 else str(role.warps[0])
        numbers: list[float] = [role.slots[pipe] for pipe in PIPES]
        numbers += [role.bytes[memory] / 1024 for memory in MEMORIES]
        numbers += [role.waits, role.blocked]
        cells = "".join(f"{number / tiles:11.1f}" for number in numbers)
        lines.append(f"{role.name:14s}{span:>8s}{cells}")
    return "\n".join(lines)
