"""What the host computes for a launch, as data: from tensors and scalars to parameters and a grid.

A program is evaluated over numbered slots: first the inputs, then constants, then the result of
each step. It is plain JSON, so a package carries it beside a cubin.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .integers import NAMESPACE, expression

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
    """One kernel launch; `grid` and `block` are slots.

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

    def evaluator(self) -> Callable[[Sequence[int]], list[int]]:
        """A function from the numbers of `inputs` to those in all slots."""
        names = [f"s{i}" for i in range(len(self.inputs))]
        lines = [f"[{', '.join(names)}] = inputs"]
        names += [str(int(constant)) for constant in self.constants]
        for step in self.steps:
            operands = [names[slot] for slot in step.operands]
            text = expression(step.name, int(step.width), int(step.to), operands)
            lines.append(f"s{len(names)} = {text}")
            names.append(f"s{len(names)}")
        return made_function("inputs", lines, names)

    def reader(self) -> Callable[[Any], list[int]]:
        """A function from the nested arguments of a call to the numbers of `inputs`, unsigned."""
        found: dict[str, int] = {}
        lines, values = [], []
        for i in self.inputs:
            at = "".join(f"[{int(index)}]" for index in i.path)
            if i.kind in (INT32, FLOAT32):
                number = f"arguments{at}"
                values.append(f"bits({number})" if i.kind == FLOAT32 else _masked(number, i.width))
                continue
            if at not in found:
                n = found[at] = len(found)
                lines.append(
                    f"t{n} = arguments{at}; shape{n} = t{n}.shape; stride{n} = t{n}.stride()"
                )
            n = found[at]
            if i.kind == POINTER:
                values.append(f"t{n}.data_ptr()")
            elif i.kind == SHAPE:
                values.append(f"shape{n}[{int(i.dim)}]")
            else:
                values.append(_masked(f"stride{n}[{int(i.dim)}]", i.width))
        return made_function("arguments", lines, values, bits=_bits)


def _masked(number: str, width: int) -> str:
    return f"int({number}) & {(1 << width) - 1}"


def _bits(number: float) -> int:
    """Those of a float32."""
    return _bits32.unpack(_float32.pack(number))[0]


def made_function(
    arguments: str, lines: Sequence[str], values: Sequence[str], **names: Any
) -> Callable:
    """The function of `arguments` that runs `lines` and returns a list of `values`.

    They may use `names` beside what expressions of `integers` call.
    """
    body = "\n    ".join((*lines, f"return [{', '.join(values)}]"))
    namespace = NAMESPACE | names
    exec(f"def function({arguments}):\n    {body}\n", namespace)
    return namespace["function"]
