"""f16, bf16 and their packed pairs: computed in float32 (exact or rounded once), then narrowed."""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .convert import narrow_bf16
from .float_arith import EXTREMA, bf16_to_f32, flush, mixed
from .registry import instruction

HALVES = "f16 f16x2 bf16 bf16x2"
_BINARY = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}"}
_OTHER = {
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "fma": "{0} * {1} + {2}",
    "ex2": "np.exp2({0})",
    "tanh": "np.tanh({0})",
}


def widen_f16(bits: Any) -> Any:
    return bits.view(np.float16).astype(np.float64)


def widen_bf16(bits: Any) -> Any:
    return bf16_to_f32(bits).astype(np.float64)


def narrow_f16(value: Any) -> Any:
    return value.astype(np.float16).view(np.uint16)


def narrow_bf16_64(value: Any) -> Any:
    return narrow_bf16(value.astype(np.float32))


def low16(value: Any) -> Any:
    return value.astype(np.uint16)


def high16(value: Any) -> Any:
    return (value >> np.uint32(16)).astype(np.uint16)


def pack16(low: Any, high: Any) -> Any:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


@instruction("add", "sub", "mul", "fma", "min", "max", "neg", "abs", "ex2", "tanh", types=HALVES)
def arithmetic(e: Emitter, ins: Instruction) -> None:
    """float64 holds sums and products of halves exactly, up to fma, where it is 53 bits wide."""
    if ins.has("f32"):  # f32 arithmetic with f16 or bf16 factors
        mixed(e, ins)
        return
    if ins.has("sat", "relu", "NaN", "xorsign"):
        raise Unmodelled(e.text)
    template = _BINARY.get(ins.opcode) or _OTHER.get(ins.opcode, "")
    brain = ins.type.startswith("bf16")

    def result(parts: list[str]) -> str:
        if ins.opcode in EXTREMA:
            return e.call(EXTREMA[ins.opcode], *parts)
        value = template.format(*parts)
        return e.call(flush, value) if ins.has("ftz") else value

    widen, narrow = (widen_bf16, narrow_bf16_64) if brain else (widen_f16, narrow_f16)
    if not ins.type.endswith("x2"):
        parts = [e.temp(e.call(widen, e.get(o, "u16"))) for o in ins.operands[1:]]
        e.put(ins.operands[0], e.call(narrow, result(parts)), "u16")
        return
    words = [e.get(operand, "u32") for operand in ins.operands[1:]]
    halves = []
    for side in (low16, high16):
        parts = [e.temp(e.call(widen, e.call(side, word))) for word in words]
        halves.append(e.temp(e.call(narrow, result(parts))))
    e.put(ins.operands[0], e.call(pack16, *halves), "u32")
