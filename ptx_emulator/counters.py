"""Issue slots by pipe for each warp, added up over the CTAs of a launch.

A slot is one instruction of one warp. Pipes are told by the opcode alone, so a slot is what the
PTX asks for; ptxas may fuse or split instructions.
"""

from dataclasses import asdict, dataclass

import numpy as np

from .ptx.program import Program
from .ptx.syntax import Instruction

PIPES = ("tensor", "mufu", "fma", "alu", "lsu", "tma", "barrier", "control")

_TENSOR = frozenset({"mma", "wgmma"})
_MUFU = frozenset({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"})
_FLOAT = frozenset({"fma", "mul", "add", "sub", "mad"})
_MEMORY = frozenset({"ld", "st", "ldmatrix", "stmatrix", "atom", "red", "shfl", "prefetch"})
_BARRIER = frozenset({"mbarrier", "bar", "barrier", "fence", "membar"})
_CONTROL = frozenset({"bra", "ret", "exit", "elect", "setmaxnreg", "griddepcontrol"})


def pipe_of(instruction: Instruction) -> str:
    """The pipe that issues an instruction."""
    name = instruction.opcode
    if name in _TENSOR or (name == "tcgen05" and instruction.has("mma")):
        return "tensor"
    if name in _MUFU:
        return "mufu"
    if name == "cp":
        return "tma" if instruction.has("bulk") else "lsu"
    if name in _MEMORY or name == "tcgen05":
        return "lsu"
    if name in _BARRIER:
        return "barrier"
    if name in _CONTROL:
        return "control"
    floating = instruction.type.startswith(("f16", "f32", "bf16", "f64"))
    return "fma" if name in _FLOAT and floating else "alu"


@dataclass(frozen=True)
class Role:
    """Warps of a CTA that do the same kind of work, and the slots that all of them issued."""

    name: str
    warps: list[int]
    slots: dict[str, int]


def slots_by_warp(program: Program, blocks: np.ndarray) -> np.ndarray:
    """(warps, pipes) slots from (blocks, warps) counts of how often a block was begun."""
    table = np.zeros((len(program.flow.blocks), len(PIPES)), np.int64)
    for block in program.flow.blocks:
        for instruction in block.code:
            table[block.index, PIPES.index(pipe_of(instruction))] += 1
        table[block.index, PIPES.index("control")] += len(block.targets) == 2
    return blocks[: len(table)].T @ table


def roles(program: Program, blocks: np.ndarray) -> list[Role]:
    """Warps by what they do: matrix products, copies, both, or neither."""
    slots = slots_by_warp(program, blocks)
    tensor, tma = slots[:, PIPES.index("tensor")] > 0, slots[:, PIPES.index("tma")] > 0
    kinds = {
        "compute": tensor & ~tma,
        "load": tma & ~tensor,
        "compute and load": tensor & tma,
        "other": ~(tensor | tma),
    }
    return [
        Role(
            name,
            np.flatnonzero(members).tolist(),
            dict(zip(PIPES, slots[members].sum(axis=0).tolist(), strict=True)),
        )
        for name, members in kinds.items()
        if members.any()
    ]


def as_dicts(found: list[Role]) -> list[dict]:
    """For JSON."""
    return [asdict(role) for role in found]


def as_table(found: list[Role]) -> str:
    """For people."""
    lines = [f"{'role':18s}{'warps':8s}" + "".join(f"{pipe:>10s}" for pipe in PIPES)]
    for role in found:
        span = f"{role.warps[0]}-{role.warps[-1]}"
        numbers = "".join(f"{role.slots[pipe]:10d}" for pipe in PIPES)
        lines.append(f"{role.name:18s}{span:8s}{numbers}")
    return "\n".join(lines)
