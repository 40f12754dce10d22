"""Single and double precision arithmetic, packed f32x2, and the approximations of the MUFU.

Results are those of IEEE 754 in round-to-nearest unless the instruction names another rounding.
fma rounds once: it is evaluated in float64, where the product of two floats is exact, and the rare
sums that float64 would round twice are corrected.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..ptx.emit import Emitter, Value
from ..ptx.syntax import Instruction, Operand
from .registry import instruction

F32 = np.float32
Operation = Callable[[list[str]], str]


def flush(value: Any) -> Any:
    """Denormals as zeros of the same sign (.ftz)."""
    small = np.abs(value) < np.float32(1.17549435e-38)
    return np.where(small, np.copysign(np.float32(0), value), value)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once to nearest even."""
    exact = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = exact + wide
    result = total.astype(F32)
    tail = total.view(np.int64) & 0x1FFFFFFF if isinstance(total, np.ndarray) else None
    if tail is None or (tail == 0x10000000).any() or (np.abs(result) < 1.2e-38).any():
        return to_odd(exact, wide, total).astype(F32)
    return result


def to_odd(a: Any, b: Any, total: Any) -> Any:
    """The float64 sum a + b rounded to odd, so that rounding it again rounds only once."""
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = np.asarray(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    return np.where(inexact, bits + step, bits).view(np.float64)


def toward(exact: Any, direction: str) -> Any:
    """A float64 value as float32, rounded down, up or to zero."""
    near = exact.astype(F32)
    wide = near.astype(np.float64)
    down = np.nextafter(near, F32(-np.inf))
    up = np.nextafter(near, F32(np.inf))
    if direction == "rm":
        return np.where(wide > exact, down, near)
    if direction == "rp":
        return np.where(wide < exact, up, near)
    return np.where(np.abs(wide) > np.abs(exact), np.where(exact > 0, down, up), near)


def directed(direction: str, name: str) -> Callable[..., Any]:
    """add, sub, mul or fma with a directed rounding."""

    def run(a: Any, b: Any, c: Any = 0.0) -> Any:
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if name == "mul":
            return toward(x * y, direction)
        first, second = (x * y, np.asarray(c, np.float64)) if name == "fma" else (x, y)
        second = -second if name == "sub" else second
        return toward(to_odd(first, second, first + second), direction)

    run.__name__ = f"{name}_{direction}"
    return run


_DIRECTED = {
    (name, mode): directed(mode, name)
    for name in ("add", "sub", "mul", "fma")
    for mode in ("rm", "rp", "rz")
}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*"}


def arithmetic_of(e: Emitter, ins: Instruction) -> Operation:
    """Expression of the instruction's result from its float32 operands."""
    mode = next((m for m in ins.mods if m in ("rm", "rp", "rz")), None)
    name = "fma" if ins.opcode == "mad" else ins.opcode

    def expression(parts: list[str]) -> str:
        if ins.has("ftz"):
            parts = [e.temp(e.call(flush, part)) for part in parts]
        if mode:
            result = e.call(_DIRECTED[name, mode], *parts)
        elif name == "fma":
            result = e.call(fused, *parts)
        else:
            result = f"{parts[0]} {_OPERATORS[name]} {parts[1]}"
        if ins.has("ftz"):
            result = e.call(flush, result)
        if ins.has("sat"):
            result = f"np.fmin(np.fmax({result}, {e.const(0, 'f32')}), {e.const(1, 'f32')})"
        return result

    return expression


@instruction("add", "sub", "mul", "fma", "mad", types="f32")
def arithmetic(e: Emitter, ins: Instruction) -> None:
    parts = [e.get(operand, "f32") for operand in ins.operands[1:]]
    e.put(ins.operands[0], arithmetic_of(e, ins)(parts), "f32")


def mixed(e: Emitter, ins: Instruction) -> None:
    """f32 arithmetic whose first operands are f16 or bf16 (sm_100)."""
    parts = []
    last = len(ins.operands) - 1
    for index, operand in enumerate(ins.operands[1:], 1):
        if index == last:
            parts.append(e.get(operand, "f32"))
        elif ins.has("bf16"):
            parts.append(e.temp(e.call(bf16_to_f32, e.get(operand, "u16"))))
        else:
            parts.append(e.temp(f"{e.get(operand, 'f16')}.astype(D_f32)"))
    e.put(ins.operands[0], arithmetic_of(e, ins)(parts), "f32")


def bf16_to_f32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << np.uint32(16)).view(F32)


@instruction("add", "sub", "mul", "fma", types="f32x2")
def packed(e: Emitter, ins: Instruction) -> None:
    """Two float32 in a 64-bit register: the halves are computed apart and stay apart."""
    operation = arithmetic_of(e, ins)
    sources = [e.halves(operand) for operand in ins.operands[1:]]
    halves = []
    for side in (0, 1):
        parts = [e.view(source[side], "f32") for source in sources]
        halves.append(Value({"f32": e.temp(operation(parts))}))
    put_halves(e, ins.operands[0], halves)


def put_halves(e: Emitter, target: Operand | None, halves: list[Value]) -> None:
    """Write a 64-bit register, or the two 32-bit ones that stand for it."""
    value = Value()
    value.pair = (halves[0], halves[1])
    e.put_value(target, value)


def extremum_of(function: Callable[..., Any], name: str) -> Callable[[Any, Any], Any]:
    """fmin, fmax, minimum or maximum; of two zeros the negative one is the smaller."""
    sign = -1 if "min" in name or "small" in name else 1

    def run(a: Any, b: Any) -> Any:
        result = function(a, b)
        if np.all(result):
            return result
        kind = result.dtype.type(sign)
        return np.where((a == 0) & (b == 0), kind * (kind * a + kind * b), result)

    run.__name__ = name
    return run


EXTREMA = {
    "min": extremum_of(np.fmin, "smaller"),
    "max": extremum_of(np.fmax, "larger"),
    "min.NaN": extremum_of(np.minimum, "minimum_or_nan"),
    "max.NaN": extremum_of(np.maximum, "maximum_or_nan"),
}


@instruction("min", "max", types="f32")
def extremum(e: Emitter, ins: Instruction) -> None:
    parts = [e.get(operand, "f32") for operand in ins.operands[1:]]
    if ins.has("xorsign"):
        raise Unmodelled(e.text)
    function = EXTREMA[ins.opcode + (".NaN" if ins.has("NaN") else "")]
    expression = parts[0]
    for part in parts[1:]:
        expression = e.call(function, expression, part)
    if ins.has("ftz"):
        expression = e.call(flush, expression)
    if ins.has("abs"):
        raise Unmodelled(e.text)
    e.put(ins.operands[0], expression, "f32")


@instruction("neg", "abs", types="f32")
def sign(e: Emitter, ins: Instruction) -> None:
    a = e.get(ins.operands[1], "f32")
    e.put(ins.operands[0], f"-{a}" if ins.opcode == "neg" else f"np.abs({a})", "f32")


@instruction("copysign", types="f32")
def copysign(e: Emitter, ins: Instruction) -> None:
    a, b = (e.get(operand, "f32") for operand in ins.operands[1:])
    e.put(ins.operands[0], f"np.copysign({b}, {a})", "f32")


def wide(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """A float32 function evaluated in float64 and rounded once."""

    def run(value: Any) -> Any:
        return function(value.astype(np.float64)).astype(F32)

    run.__name__ = name
    return run


def exp2(value: Any) -> Any:
    return np.exp2(value)


def log2(value: Any) -> Any:
    return np.log2(value)


def tanh(value: Any) -> Any:
    return np.tanh(value)


_MUFU: dict[str, Callable[[Any], Any]] = {
    "ex2": exp2,
    "lg2": log2,
    "tanh": tanh,
    "rcp": wide(lambda x: 1.0 / x, "reciprocal"),
    "sqrt": wide(np.sqrt, "square_root"),
    "rsqrt": wide(lambda x: 1.0 / np.sqrt(x), "reciprocal_root"),
    "sin": wide(np.sin, "sine"),
    "cos": wide(np.cos, "cosine"),
}


@instruction("ex2", "lg2", "tanh", "rcp", "sqrt", "rsqrt", "sin", "cos", types="f32")
def mufu(e: Emitter, ins: Instruction) -> None:
    """Within the PTX manual's bounds, since correctly rounded or within 1 ulp of it."""
    value = e.get(ins.operands[1], "f32")
    if ins.has("ftz"):
        value = e.temp(e.call(flush, value))
    result = e.call(_MUFU[ins.opcode], value)
    if ins.has("ftz"):
        result = e.call(flush, result)
    e.put(ins.operands[0], result, "f32")


@instruction("div", types="f32")
def divide(e: Emitter, ins: Instruction) -> None:
    if ins.has("rm", "rp", "rz"):
        raise Unmodelled(e.text)
    a, b = (e.get(operand, "f32") for operand in ins.operands[1:])
    result = f"{a} / {b}"
    e.put(ins.operands[0], e.call(flush, result) if ins.has("ftz") else result, "f32")


@instruction("add", "sub", "mul", "div", "min", "max", "neg", "abs", "sqrt", "rcp", types="f64")
def double(e: Emitter, ins: Instruction) -> None:
    parts = [e.get(operand, "f64") for operand in ins.operands[1:]]
    binary = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
    if ins.has("rm", "rp", "rz"):
        raise Unmodelled(e.text)
    if ins.opcode in binary:
        result = f"{parts[0]} {binary[ins.opcode]} {parts[1]}"
    elif ins.opcode in ("min", "max"):
        result = f"np.f{ins.opcode}({parts[0]}, {parts[1]})"
    elif ins.opcode == "rcp":
        result = f"{e.const(1.0, 'f64')} / {parts[0]}"
    else:
        result = {"neg": f"-{parts[0]}", "abs": f"np.abs({parts[0]})"}.get(
            ins.opcode, f"np.sqrt({parts[0]})"
        )
    e.put(ins.operands[0], result, "f64")


@instruction("fma", "mad", types="f64")
def double_fma(e: Emitter, ins: Instruction) -> None:
    """In long double, 64 bits of significand: one more rounding than hardware has."""
    parts = [e.get(operand, "f64") for operand in ins.operands[1:]]
    e.put(ins.operands[0], e.call(fused_double, *parts), "f64")


def fused_double(a: Any, b: Any, c: Any) -> Any:
    extended = np.longdouble
    return (a.astype(extended) * b.astype(extended) + c.astype(extended)).astype(np.float64)


@instruction("testp", types="f32")
def testp(e: Emitter, ins: Instruction) -> None:
    a = e.get(ins.operands[1], "f32")
    tests = {
        "finite": f"np.isfinite({a})",
        "infinite": f"np.isinf({a})",
        "number": f"~np.isnan({a})",
        "notanumber": f"np.isnan({a})",
    }
    if ins.mods[0] not in tests:
        raise Unmodelled(e.text)
    e.put(ins.operands[0], tests[ins.mods[0]], "b1")
