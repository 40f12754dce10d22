"""What the host computes for a launch, as data: from tensors and scalars to parameters and a grid.

A program is evaluated over numbered slots: first the inputs, then constants, then the result of
each step. It is plain JSON, so a package carries it beside a cubin.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .integers import operation

POINTER = "pointer"
SHAPE = "shape"
STRIDE = "stride"
INT32 = "int32"
FLOAT32 = "float32"

_float32 = struct.Struct("<f")
_bits32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Input:
    """A number that a call brings: where it is in the nested arguments, and what of it.

    `kind` is POINTER, SHAPE or STRIDE (of a tensor, of dimension `dim`), INT32 or FLOAT32.
    """

    path: tuple[int, ...]
    kind: str
    width: int
    dim: int = 0

    def read(self, arguments: Any) -> int:
        """Its value in the arguments of a call, unsigned."""
        found = arguments
        for index in self.path:
            found = found[index]
        if self.kind == POINTER:
            return found.data_ptr()
        if self.kind == SHAPE:
            return found.shape[self.dim]
        if self.kind == STRIDE:
            return found.stride(self.dim) & (1 << self.width) - 1
        if self.kind == FLOAT32:
            return _bits32.unpack(_float32.pack(found))[0]
        return int(found) & (1 << self.width) - 1


@dataclass(frozen=True, slots=True)
class Step:
    """`name` of the numbers in slots `operands`, of `width` bits; the result has `to`."""

    name: str
    width: int
    to: int
    operands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """`size` bytes at `offset` of a parameter come from `slot`."""

    offset: int
    size: int
    slot: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch; `grid`, `block` and `cluster` are slots.

    `params` are (size in bytes, fields); what no field fills is zero. `attributes` are launch
    attributes (number, 32-bit words) of the CUDA driver.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    attributes: tuple[tuple[int, tuple[int, ...]], ...]
    params: tuple[tuple[int, tuple[Field, ...]], ...]


@dataclass(frozen=True, slots=True)
class KernelAttribute:
    """What is set once for a kernel on a device: attribute `number` of the driver to `value`.

    `value` None is as much dynamic shared memory as the device has room for.
    """

    kernel: str
    number: int
    value: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """All launches of one call.

    `follows` are the slots that lie at a constant distance from a pointer, as (slot, input): where
    nothing but addresses differs from an earlier call, only these change. `decisive` are pointers
    that decide something else too, such as their distance from another: calls with other addresses
    there are other calls.
    """

    inputs: tuple[Input, ...]
    constants: tuple[int, ...]
    steps: tuple[Step, ...]
    launches: tuple[Launch, ...]
    attributes: tuple[KernelAttribute, ...]
    follows: tuple[tuple[int, int], ...]
    decisive: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As lists and numbers."""
        return {
            "inputs": [[list(i.path), i.kind, i.width, i.dim] for i in self.inputs],
            "constants": list(self.constants),
            "steps": [[s.name, s.width, s.to, list(s.operands)] for s in self.steps],
            "launches": [
                asdict(launch)
                | {
                    "params": [
                        [size, [[f.offset, f.size, f.slot] for f in fields]]
                        for size, fields in launch.params
                    ]
                }
                for launch in self.launches
            ],
            "attributes": [[a.kernel, a.number, a.value] for a in self.attributes],
            "follows": [list(pair) for pair in self.follows],
            "decisive": list(self.decisive),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Program:
        """The inverse of `to_json`."""
        return Program(
            tuple(Input(tuple(path), *rest) for path, *rest in data["inputs"]),
            tuple(data["constants"]),
            tuple(Step(name, w, to, tuple(slots)) for name, w, to, slots in data["steps"]),
            tuple(
                Launch(
                    launch["kernel"],
                    tuple(launch["grid"]),
                    tuple(launch["block"]),
                    launch["shared_memory"],
                    tuple((number, tuple(words)) for number, words in launch["attributes"]),
                    tuple(
                        (size, tuple(Field(*field) for field in fields))
                        for size, fields in launch["params"]
                    ),
                )
                for launch in data["launches"]
            ),
            tuple(KernelAttribute(*attribute) for attribute in data["attributes"]),
            tuple((slot, source) for slot, source in data["follows"]),
            tuple(data["decisive"]),
        )

    def functions(self) -> list[tuple[Callable[..., int], tuple[int, ...]]]:
        """The steps, ready to be evaluated."""
        return [(operation(s.name, s.width, s.to), s.operands) for s in self.steps]


def evaluate(
    program: Program, functions: list[tuple[Callable[..., int], tuple[int, ...]]], inputs: list[int]
) -> list[int]:
    """The values of all slots."""
    slots = [*inputs, *program.constants]
    append = slots.append
    for function, operands in functions:
        append(function(*[slots[i] for i in operands]))
    return slots
