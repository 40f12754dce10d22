"""cvt between integers, floats, halves and packed halves."""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .convert_fp8 import MANTISSA
from .convert_fp8 import convert as convert_fp8
from .float_arith import toward
from .move import storage
from .registry import instruction

_FLOATS = ("f16", "bf16", "f32", "f64", "tf32")


def narrow_bf16(value: Any) -> Any:
    """float32 to bf16 bits, to nearest even; any NaN becomes the canonical one."""
    bits = value.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    result = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(value != value, np.uint16(0x7FFF), result)


def truncate_bf16(value: Any) -> Any:
    """float32 to bf16 bits toward zero."""
    result = (value.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(value != value, np.uint16(0x7FFF), result)


def narrow_f16(value: Any) -> Any:
    result = value.astype(np.float16).view(np.uint16)
    return np.where(value != value, np.uint16(0x7FFF), result)


def truncate_f16(value: Any) -> Any:
    """float32 to f16 bits toward zero; what is too large becomes the largest."""
    near = narrow_f16(value)
    beyond = np.abs(near.view(np.float16).astype(np.float32)) > np.abs(value)
    return np.where(beyond, near - np.uint16(1), near)


def narrow_tf32(value: Any) -> Any:
    """float32 with 10 bits of fraction, to nearest, ties away from zero."""
    rounded = (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded.view(np.float32), value)


def pack_halves(high: Any, low: Any) -> Any:
    return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)


@instruction("cvt")
def cvt(e: Emitter, ins: Instruction) -> None:
    kinds = [m for m in ins.mods if m in _FLOATS or m[1:].isdigit() or m.endswith("x2")]
    to, source = kinds[0], kinds[-1]
    if to in MANTISSA or source in MANTISSA:
        convert_fp8(e, ins, to, source)
    elif to in ("bf16x2", "f16x2"):
        _packed(e, ins, to, source)
    elif to.endswith("x2") or source.endswith("x2"):
        raise Unmodelled(e.text)
    elif (to, source) == ("tf32", "f32") and ins.has("rna"):
        e.put(ins.operands[0], e.call(narrow_tf32, e.get(ins.operands[1], "f32")), "f32")
    elif to in _FLOATS or source in _FLOATS:
        _floating(e, ins, to, source)
    else:
        _integer(e, ins, to, source)


def _packed(e: Emitter, ins: Instruction, to: str, source: str) -> None:
    if source != "f32" or len(ins.operands) != 3:
        raise Unmodelled(e.text)
    narrow = _narrowing(e, ins, to[:-2])
    parts = []
    for operand in ins.operands[1:]:
        value = e.get(operand, "f32")
        if ins.has("relu"):
            zero = e.const(0, "f32")
            value = e.temp(f"np.where({value} <= {zero}, {zero}, {value})")  # NaN stays
        parts.append(e.temp(e.call(narrow, value)))
    e.put(ins.operands[0], e.call(pack_halves, *parts), "u32")


def _narrowing(e: Emitter, ins: Instruction, to: str) -> Any:
    if ins.has("satfinite", "rs", "rm", "rp", "rna"):
        raise Unmodelled(e.text)
    if to == "f16":
        return truncate_f16 if ins.has("rz") else narrow_f16
    return truncate_bf16 if ins.has("rz") else narrow_bf16


def _integer(e: Emitter, ins: Instruction, to: str, source: str) -> None:
    value = e.get(ins.operands[1], storage(source))
    if source in ("u8", "s8", "b8"):
        value = e.temp(f"{value}.astype(D_{storage(source)})")
    if ins.has("sat"):
        value = e.temp(e.call(saturate, value, f"D_{storage(to)}"))
    narrow = storage(to)
    expression = f"{value}.astype(D_{narrow})"
    if narrow in ("u8", "s8"):  # 8-bit results live in wider registers, extended
        expression, narrow = f"{expression}.astype(D_{narrow[0]}16)", f"{narrow[0]}16"
    e.put(ins.operands[0], expression, narrow)


def saturate(value: Any, to: Any) -> Any:
    info = np.iinfo(to)
    low = max(info.min, np.iinfo(value.dtype).min)
    high = min(info.max, np.iinfo(value.dtype).max)
    return np.clip(value, value.dtype.type(low), value.dtype.type(high))


def _floating(e: Emitter, ins: Instruction, to: str, source: str) -> None:
    value = _as_float(e, ins, source)
    if to not in _FLOATS:
        name = storage(to)
        expression = e.call(to_integer, value, f"D_{name}", repr(_rounding(ins, "rzi")))
        e.put(ins.operands[0], expression, name)
        return
    rounding = _rounding(ins, "")
    if rounding.endswith("i"):
        value = e.temp(e.call(round_integral, value, repr(rounding)))
    if ins.has("sat"):
        value = e.temp(f"np.fmin(np.fmax({value}, 0), 1)")
    if to in ("bf16", "f16"):
        single = e.temp(f"{value}.astype(D_f32)")
        if source not in ("f32", "f16", "bf16"):
            raise Unmodelled(e.text)
        e.put(ins.operands[0], e.call(_narrowing(e, ins, to), single), "u16")
    else:
        mode = next((m for m in ins.mods if m in ("rm", "rp", "rz")), None)
        if mode and to == "f32" and source in ("s32", "u32", "s16", "u16", "f64"):
            value = e.temp(e.call(toward, f"{value}.astype(D_f64)", repr(mode)))
        elif mode:
            raise Unmodelled(e.text)
        e.put(ins.operands[0], f"{value}.astype(D_{to})", to)


def _as_float(e: Emitter, ins: Instruction, source: str) -> str:
    if source == "bf16":
        widened = f"({e.get(ins.operands[1], 'u16')}.astype(D_u32) << {e.const(16, 'u32')})"
        return e.temp(f"{widened}.view(D_f32)")
    value = e.get(ins.operands[1], storage(source))
    if source in ("u8", "s8"):
        value = e.temp(f"{value}.astype(D_{source})")
    return value


def _rounding(ins: Instruction, default: str) -> str:
    return next((m for m in ins.mods if m in ("rni", "rzi", "rmi", "rpi")), default)


def round_integral(value: Any, mode: str) -> Any:
    function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    return function(value)


def to_integer(value: Any, kind: Any, mode: str) -> Any:
    """Float to integer: rounded, NaN to 0, clamped to the type's range."""
    wide = round_integral(np.asarray(value, np.longdouble), mode)
    info = np.iinfo(kind)
    wide = np.where(np.isnan(wide), 0, np.clip(wide, info.min, info.max))
    result = wide.astype(kind)
    return result if np.ndim(value) else result[()]
