"""mma.sync m16n8k8 and m16n8k16 with f16 or bf16 inputs.

D = A B + C with the products and their sum of one instruction exact in float64 and one rounding,
to nearest even, to the accumulator's type: fp32 accumulation, one step an instruction, k ascending.
(Hardware keeps a few bits beyond fp32 and truncates; the difference is below one ulp of the largest
term a step.) Fragments are converted once a block and accumulators stay matrices between products.
"""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..machine.gang import Gang
from ..ptx.emit import Emitter, Value
from ..ptx.syntax import Instruction, Operand, Reg
from .memory import items_of
from .registry import instruction


def widen(words: np.ndarray, brain: bool) -> np.ndarray:
    """(…) words as (…, 2) float64, the low half first."""
    halves = words.view(np.uint16)
    if brain:
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return halves.view(np.float16).astype(np.float64)


def fragment_a(g: Gang, brain: bool, *registers: Any) -> np.ndarray:
    """(warps, 16, 8 or 16): register i holds rows 8 (i % 2) and columns 8 (i // 2) onwards."""
    words = np.empty((len(registers), g.lanes), np.uint32)
    for index, register in enumerate(registers):
        words[index] = register
    deep = len(registers) // 2
    values = widen(words, brain).reshape(deep, 2, -1, 8, 8)  # k half, m half, warp, row, column
    return np.ascontiguousarray(values.transpose(2, 1, 3, 0, 4)).reshape(-1, 16, 8 * deep)


def fragment_b(g: Gang, brain: bool, *registers: Any) -> np.ndarray:
    """(warps, 8 or 16, 8): register i holds rows 8 i onwards; a lane's column is lane // 4."""
    words = np.empty((len(registers), g.lanes), np.uint32)
    for index, register in enumerate(registers):
        words[index] = register
    values = widen(words, brain).reshape(len(registers), -1, 8, 8)  # k half, warp, column, row
    turned = values.transpose(1, 0, 3, 2)
    return np.ascontiguousarray(turned).reshape(-1, 8 * len(registers), 8)


def accumulator(g: Gang, *registers: Any) -> np.ndarray:
    """(warps, 16, 8) float32 from four registers: rows 8 (i // 2) on, columns 2c + i % 2."""
    table = np.empty((len(g.warps), 2, 8, 4, 2), np.float32)
    for index, register in enumerate(registers):
        value = register.reshape(-1, 8, 4) if isinstance(register, np.ndarray) else register
        table[:, index // 2, :, :, index % 2] = value
    return table.reshape(-1, 16, 8)


def element(matrix: np.ndarray, index: int) -> np.ndarray:
    """Register `index` of an accumulator."""
    table = matrix.reshape(-1, 2, 8, 4, 2)
    return np.ascontiguousarray(table[:, index // 2, :, :, index % 2]).ravel()


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (np.matmul(a, b) + c).astype(np.float32)


@instruction("mma.sync.aligned.m16n8k16", "mma.sync.aligned.m16n8k8")
def mma(e: Emitter, ins: Instruction) -> None:
    kinds = ins.mods[5:9] if ins.mods[5] in ("f16", "f32") else ()
    if kinds not in (("f32", "f16", "f16", "f32"), ("f32", "bf16", "bf16", "f32")):
        raise Unmodelled(e.text)
    if ins.guard is not None:
        raise Unmodelled(e.text)
    brain = kinds[1] == "bf16"
    d, a, b, c = (items_of(operand) for operand in ins.operands)
    left = _fragment(e, fragment_a, a, brain)
    right = _fragment(e, fragment_b, b, brain)
    result = e.temp(e.call(product, left, right, _accumulator(e, c)))
    owner = object()
    for index, item in enumerate(d):
        value = Value()
        value.make = _element_maker(e, result, index)
        value.tag = (owner, index, result)
        e.put_value(item, value)


def _element_maker(e: Emitter, matrix: str, index: int) -> Any:
    return lambda: (e.call(element, matrix, str(index)), "f32")


def _fragment(e: Emitter, function: Any, items: list[Operand | None], brain: bool) -> str:
    names = tuple(e.get(item, "u32") for item in items)
    key = (function.__name__, brain, names)
    if key not in e.cache:
        e.cache[key] = e.temp(e.call(function, "g", str(brain), *names))
    return e.cache[key]


def _accumulator(e: Emitter, items: list[Operand | None]) -> str:
    """The matrix of which the four registers are the elements, if they are one's."""
    tags = [e.value(item).tag if isinstance(item, Reg) else None for item in items]
    first = tags[0]
    if first is not None and all(
        tag is not None and tag[0] is first[0] and tag[1] == index for index, tag in enumerate(tags)
    ):
        return first[2]
    names = tuple(e.get(item, "f32") for item in items)
    key = ("accumulator", names)
    if key not in e.cache:
        e.cache[key] = e.temp(e.call(accumulator, "g", *names))
    return e.cache[key]
