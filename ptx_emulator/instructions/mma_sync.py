"""mma.sync m16n8 with f16, bf16, tf32, e4m3, e5m2 or 8-bit integer inputs.

D = A B + C with the products and their sum of one instruction exact in float64 and one rounding,
to nearest even, to fp32: one step an instruction, k ascending. Integers are exact.
With `session(hardware_sums=True)` f16 and bf16 are added as an H200 does; see machine/sums.py.
Fragments are converted once a block and accumulators stay matrices between products.
"""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..machine import sums
from ..machine.formats import FORMATS
from ..machine.gang import Gang
from ..ptx.emit import Emitter, Value
from ..ptx.syntax import Instruction, Operand, Reg
from .memory import items_of
from .registry import instruction


def fragment(g: Gang, name: str, registers: tuple[Any, ...]) -> np.ndarray:
    """(registers, warps, 8, elements of 4 lanes) float64 of a format."""
    words = np.empty((len(registers), g.lanes), np.uint32)
    for index, register in enumerate(registers):
        words[index] = register
    values = FORMATS[name].widen(words)
    return values.reshape(len(registers), len(g.warps), 8, -1)


def fragment_a(g: Gang, name: str, *registers: Any) -> np.ndarray:
    """(warps, 16, k): register i holds rows 8 (i % 2) on, and columns of 16 bytes i // 2."""
    values = fragment(g, name, registers)
    deep = len(registers) // 2
    values = values.reshape(deep, 2, *values.shape[1:])  # k part, m half, warp, row, column
    turned = np.ascontiguousarray(values.transpose(2, 1, 3, 0, 4))
    return turned.reshape(len(g.warps), 16, -1)


def fragment_b(g: Gang, name: str, *registers: Any) -> np.ndarray:
    """(warps, k, 8): register i holds rows of 16 bytes i; a lane's column is lane // 4."""
    values = fragment(g, name, registers)  # k part, warp, column, row
    turned = np.ascontiguousarray(values.transpose(1, 0, 3, 2))
    return turned.reshape(len(g.warps), -1, 8)


def accumulator(g: Gang, dtype: Any, *registers: Any) -> np.ndarray:
    """(warps, 16, 8) from four registers: rows 8 (i // 2) on, columns 2c + i % 2."""
    table = np.empty((len(g.warps), 2, 8, 4, 2), dtype)
    for index, register in enumerate(registers):
        value = register.reshape(-1, 8, 4) if isinstance(register, np.ndarray) else register
        table[:, index // 2, :, :, index % 2] = value
    return table.reshape(-1, 16, 8)


def element(matrix: np.ndarray, index: int) -> np.ndarray:
    """Register `index` of an accumulator."""
    table = matrix.reshape(-1, 2, 8, 4, 2)
    return np.ascontiguousarray(table[:, index // 2, :, :, index % 2]).ravel()


def product(g: Gang, format: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if g.cta.machine.hardware_sums and format in sums.KNOWN:
        return sums.step(a, b, c.astype(np.float64), FORMATS[format].smallest)
    return (np.matmul(a, b) + c).astype(np.float32)


def integer_product(
    g: Gang, format: str, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """Exact in float64; the sum wraps."""
    return np.matmul(a, b).astype(np.int32) + c


_INTEGERS = ("s8", "u8")
_DEPTHS = {  # elements along K that the shapes have
    "f16": ("m16n8k8", "m16n8k16"),
    "bf16": ("m16n8k8", "m16n8k16"),
    "tf32": ("m16n8k4", "m16n8k8"),
    "e4m3": ("m16n8k16", "m16n8k32"),
    "e5m2": ("m16n8k16", "m16n8k32"),
    "s8": ("m16n8k16", "m16n8k32"),
    "u8": ("m16n8k16", "m16n8k32"),
}


@instruction("mma.sync.aligned")
def mma(e: Emitter, ins: Instruction) -> None:
    shape, *layout = (m for m in ins.mods[2:] if m != "kind::f8f6f4")
    if layout[:2] != ["row", "col"] or len(layout) != 6 or ins.guard is not None:
        raise Unmodelled(e.text)
    total, first, second, added = layout[2:]
    kind = "s32" if first in _INTEGERS else "f32"
    mixed = first != second and "8" not in first + second and {first, second} != {"e4m3", "e5m2"}
    fits = all(shape in _DEPTHS.get(name, ()) for name in (first, second))
    if not fits or mixed or (total, added) != (kind, kind):
        raise Unmodelled(e.text)
    d, a, b, c = (items_of(operand) for operand in ins.operands)
    left = _fragment(e, fragment_a, a, first)
    right = _fragment(e, fragment_b, b, second)
    function = product if kind == "f32" else integer_product
    added_to = _accumulator(e, c, kind)
    result = e.temp(e.call(function, "g", repr(first), left, right, added_to))
    owner = object()
    for index, item in enumerate(d):
        value = Value()
        value.make = _element_maker(e, result, index, kind)
        value.tag = (owner, index, result)
        e.put_value(item, value)


def _element_maker(e: Emitter, matrix: str, index: int, kind: str) -> Any:
    return lambda: (e.call(element, matrix, str(index)), kind)


def _fragment(e: Emitter, function: Any, items: list[Operand | None], format: str) -> str:
    names = tuple(e.get(item, "u32") for item in items)
    key = (function.__name__, format, names)
    if key not in e.cache:
        e.cache[key] = e.temp(e.call(function, "g", repr(format), *names))
    return e.cache[key]


def _accumulator(e: Emitter, items: list[Operand | None], kind: str) -> str:
    """The matrix of which the four registers are the elements, if they are one's."""
    tags = [e.value(item).tag if isinstance(item, Reg) else None for item in items]
    first = tags[0]
    if first is not None and all(
        tag is not None and tag[0] is first[0] and tag[1] == index for index, tag in enumerate(tags)
    ):
        return first[2]
    names = tuple(e.get(item, kind) for item in items)
    key = ("accumulator", names)
    if key not in e.cache:
        e.cache[key] = e.temp(e.call(accumulator, "g", f"D_{kind}", *names))
    return e.cache[key]
