"""Pairs of 8-bit floats: e4m3 (no infinity, largest 448) and e5m2 (as f16, largest 57344)."""

import functools
from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction

MANTISSA = {"e4m3x2": 3, "e5m2x2": 2}
NAN = np.uint16(0x7F)


@functools.cache
def magnitudes(kind: str) -> np.ndarray:
    """The values of the finite codes without a sign, ascending from 0."""
    bits = MANTISSA[kind]
    bias = 7 if kind == "e4m3x2" else 15
    code = np.arange(0x7F if kind == "e4m3x2" else 0x7C)
    exponent, mantissa = code >> bits, code & (1 << bits) - 1
    fraction = (mantissa + np.where(exponent > 0, 1 << bits, 0)) / (1 << bits)
    return fraction * np.exp2(np.maximum(exponent, 1) - bias)


def narrow(value: Any, kind: str, relu: bool) -> Any:
    """Codes of float32 values, to nearest even; what is too large becomes the largest."""
    table = magnitudes(kind)
    middle = (table[1:] + table[:-1]) / 2
    size = np.abs(value.astype(np.float64))
    low = np.searchsorted(middle, size, "left")
    high = np.searchsorted(middle, size, "right")
    code = np.where(low % 2 == 0, low, high).astype(np.uint16)  # they differ at a tie
    negative = np.signbit(value)
    code = code | (negative.astype(np.uint16) << np.uint16(7))
    if relu:
        code = np.where(negative, np.uint16(0), code)
    return np.where(np.isnan(value), NAN, code)


def pack(high: Any, low: Any) -> Any:
    return ((high << np.uint16(8)) | low).astype(np.uint16)


@functools.cache
def halves(kind: str) -> np.ndarray:
    """f16 bits of all 256 codes."""
    table = np.full(128, np.nan)
    table[: len(magnitudes(kind))] = magnitudes(kind)
    if kind == "e5m2x2":
        table[0x7C] = np.inf
    bits = table.astype(np.float16).view(np.uint16)
    bits[np.isnan(table)] = 0x7FFF
    return np.concatenate([bits, bits | np.where(np.isnan(table), 0, 0x8000).astype(np.uint16)])


def widen(pair: Any, kind: str) -> Any:
    """Two codes as two f16."""
    table = halves(kind)
    low, high = table[pair & np.uint16(255)], table[pair >> np.uint16(8)]
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def half(word: Any, side: int) -> Any:
    """One f16 of a pair as float32."""
    bits = (word >> np.uint32(16 * side)).astype(np.uint16)
    return bits.view(np.float16).astype(np.float32)


def convert(e: Emitter, ins: Instruction, to: str, source: str) -> None:
    """cvt to or from a pair of 8-bit floats."""
    target, *operands = ins.operands
    if source in MANTISSA and to == "f16x2" and not ins.has("relu"):
        e.put(target, e.call(widen, e.get(operands[0], "u16"), repr(source)), "u32")
        return
    if to not in MANTISSA or not ins.has("satfinite") or source not in ("f32", "f16x2"):
        raise Unmodelled(e.text)
    if source == "f32":
        values = [e.get(operand, "f32") for operand in operands]
    else:
        word = e.get(operands[0], "u32")
        values = [e.temp(e.call(half, word, str(side))) for side in (1, 0)]
    codes = [e.temp(e.call(narrow, v, repr(to), str(ins.has("relu")))) for v in values]
    e.put(target, e.call(pack, *codes), "u16")
