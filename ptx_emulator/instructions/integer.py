"""Integer arithmetic and bit operations."""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction
from .move import raw, storage
from .registry import instruction

INTEGERS = "u16 u32 u64 s16 s32 s64 b16 b32 b64"


@instruction("add", "sub", "and", "or", "xor", types=INTEGERS)
def arithmetic(e: Emitter, ins: Instruction) -> None:
    target, a, b = ins.operands
    if ins.has("sat", "cc"):
        raise Unmodelled(e.text)
    operator = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}[ins.opcode]
    kind = raw(ins.type)
    e.put(target, f"{e.get(a, kind)} {operator} {e.get(b, kind)}", kind)


@instruction("not", types=INTEGERS)
def invert(e: Emitter, ins: Instruction) -> None:
    target, a = ins.operands
    e.put(target, f"~{e.get(a, raw(ins.type))}", raw(ins.type))


@instruction("cnot", types=INTEGERS)
def logical_not(e: Emitter, ins: Instruction) -> None:
    kind = raw(ins.type)
    zero = e.const(0, kind)
    e.put(ins.operands[0], f"({e.get(ins.operands[1], kind)} == {zero}).astype(D_{kind})", kind)


@instruction("neg", "abs", types=INTEGERS)
def unary(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    a = e.get(ins.operands[1], kind)
    e.put(ins.operands[0], f"-{a}" if ins.opcode == "neg" else f"np.abs({a})", kind)


@instruction("min", "max", types=INTEGERS)
def extremum(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    parts = [e.get(operand, kind) for operand in ins.operands[1:]]
    function = "np.minimum" if ins.opcode == "min" else "np.maximum"
    expression = parts[0]
    for part in parts[1:]:
        expression = f"{function}({expression}, {part})"
    if ins.has("relu"):
        expression = f"np.maximum({expression}, {e.const(0, kind)})"
    e.put(ins.operands[0], expression, kind)


@instruction("shl", "shr", types=INTEGERS)
def shift(e: Emitter, ins: Instruction) -> None:
    """Amounts beyond the width shift everything out, in PTX as in NumPy."""
    target, a, amount = ins.operands
    kind = storage(ins.type) if ins.opcode == "shr" else raw(ins.type)
    if isinstance(amount, Imm):
        by = e.const(min(amount.value & 0xFFFFFFFF, 255), kind)
    else:
        limit = e.const(255, "u32")
        by = e.temp(f"np.minimum({e.get(amount, 'u32')}, {limit}).astype(D_{kind})")
    e.put(target, f"{e.get(a, kind)} {'<<' if ins.opcode == 'shl' else '>>'} {by}", kind)


@instruction("shf")
def funnel_shift(e: Emitter, ins: Instruction) -> None:
    """{b, a} shifted; wrap and clamp differ beyond 32."""
    target, low, high, amount = ins.operands
    by = e.get(amount, "u32")
    limit = (
        f"({by} & {e.const(31, 'u32')})"
        if ins.has("wrap")
        else (f"np.minimum({by}, {e.const(32, 'u32')})")
    )
    function = funnel_left if ins.has("l") else funnel_right
    e.put(target, e.call(function, e.get(low, "u32"), e.get(high, "u32"), limit), "u32")


def funnel_left(low: Any, high: Any, by: Any) -> Any:
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return ((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def funnel_right(low: Any, high: Any, by: Any) -> Any:
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return (both >> by.astype(np.uint64)).astype(np.uint32)


_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def product(e: Emitter, ins: Instruction, a: str, b: str) -> tuple[str, str]:
    """Expression and type of mul's lo, hi or wide result."""
    kind = storage(ins.type)
    if ins.has("wide"):
        wide = _WIDE[kind]
        return f"{a}.astype(D_{wide}) * {b}.astype(D_{wide})", wide
    if ins.has("hi"):
        if kind in ("u64", "s64"):
            return e.call(high_product_u64 if kind == "u64" else high_product_s64, a, b), kind
        wide = _WIDE[kind]
        bits = e.const(int(kind[1:]), wide)
        return f"(({a}.astype(D_{wide}) * {b}.astype(D_{wide})) >> {bits}).astype(D_{kind})", kind
    return f"{a} * {b}", kind


@instruction("mul", types=INTEGERS)
def mul(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    if not ins.has("wide", "hi"):
        kind = raw(ins.type)
        e.put(
            ins.operands[0],
            f"{e.get(ins.operands[1], kind)} * {e.get(ins.operands[2], kind)}",
            kind,
        )
        return
    a, b = (e.get(operand, kind) for operand in ins.operands[1:3])
    expression, result = product(e, ins, a, b)
    e.put(ins.operands[0], expression, result)


@instruction("mad", types=INTEGERS)
def mad(e: Emitter, ins: Instruction) -> None:
    if ins.has("sat", "cc"):
        raise Unmodelled(e.text)
    kind = storage(ins.type)
    a, b = (e.get(operand, kind) for operand in ins.operands[1:3])
    expression, result = product(e, ins, a, b)
    e.put(ins.operands[0], f"{expression} + {e.get(ins.operands[3], result)}", result)


@instruction("mul24", "mad24")
def mul24(e: Emitter, ins: Instruction) -> None:
    if ins.has("hi"):
        raise Unmodelled(e.text)
    kind = storage(ins.type)
    shift_by = e.const(8, kind)
    a, b = (f"(({e.get(x, kind)} << {shift_by}) >> {shift_by})" for x in ins.operands[1:3])
    tail = f" + {e.get(ins.operands[3], kind)}" if ins.opcode == "mad24" else ""
    e.put(ins.operands[0], f"{a} * {b}{tail}", kind)


def high_product_u64(a: Any, b: Any) -> Any:
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    return a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & mask)) >> half)


def high_product_s64(a: Any, b: Any) -> Any:
    x, y = a.view(np.uint64), b.view(np.uint64)
    zero = np.uint64(0)
    high = high_product_u64(x, y) - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(np.int64)


@instruction("div", "rem", types=INTEGERS)
def divide(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    a, b = (e.get(operand, kind) for operand in ins.operands[1:])
    function = quotient if ins.opcode == "div" else remainder
    e.put(ins.operands[0], e.call(function, a, b), kind)


def quotient(a: Any, b: Any) -> Any:
    """Division that truncates; all bits set for a zero divisor, as the hardware does."""
    safe = np.where(b == 0, np.ones_like(b), b)
    floor = a // safe
    exact = a - floor * safe
    up = ((exact != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(b), floor + up)


def remainder(a: Any, b: Any) -> Any:
    """All bits set for a zero divisor."""
    return np.where(b == 0, ~np.zeros_like(b), a - quotient(a, b) * b)


@instruction("sad")
def sad(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    a, b, c = (e.get(operand, kind) for operand in ins.operands[1:])
    e.put(ins.operands[0], f"np.maximum({a}, {b}) - np.minimum({a}, {b}) + {c}", kind)


@instruction("popc")
def popc(e: Emitter, ins: Instruction) -> None:
    a = e.get(ins.operands[1], raw(ins.type))
    e.put(ins.operands[0], f"np.bitwise_count({a}).astype(D_u32)", "u32")


@instruction("clz")
def clz(e: Emitter, ins: Instruction) -> None:
    bits = int(ins.type[1:])
    value = e.call(highest_bit, e.get(ins.operands[1], raw(ins.type)))
    e.put(ins.operands[0], f"({e.const(bits - 1, 's64')} - {value}).astype(D_u32)", "u32")


def highest_bit(value: Any) -> Any:
    """Position of the highest bit set, -1 for zero."""
    low = (value & np.array(0xFFFFFFFF, value.dtype)).astype(np.float64)
    high = (value.astype(np.uint64) >> np.uint64(32)).astype(np.float64)
    position = np.where(high > 0, np.frexp(high)[1] + 31, np.frexp(low)[1] - 1)
    return position.astype(np.int64)


@instruction("bfind")
def bfind(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    value = e.get(ins.operands[1], kind)
    if kind[0] == "s":
        value = e.temp(f"np.where({value} < 0, ~{value}, {value}).view(D_u{kind[1:]})")
    result = e.temp(e.call(highest_bit, value))
    if ins.has("shiftamt"):
        top = e.const(int(kind[1:]) - 1, "s64")
        result = e.temp(f"np.where({result} < 0, {result}, {top} - {result})")
    e.put(ins.operands[0], f"{result}.astype(D_u32)", "u32")


@instruction("brev")
def brev(e: Emitter, ins: Instruction) -> None:
    kind = raw(ins.type)
    e.put(ins.operands[0], e.call(reverse_bits, e.get(ins.operands[1], kind)), kind)


def reverse_bits(value: Any) -> Any:
    kind = value.dtype.type
    result, bits = np.zeros_like(value), 8 * value.dtype.itemsize
    for index in range(bits):
        bit = (value >> kind(index)) & kind(1)
        result = result | (bit << kind(bits - 1 - index))
    return result


@instruction("bfe")
def bfe(e: Emitter, ins: Instruction) -> None:
    kind = storage(ins.type)
    a = e.get(ins.operands[1], kind)
    start, size = (e.get(operand, "u32") for operand in ins.operands[2:])
    e.put(ins.operands[0], e.call(extract_field, a, start, size), kind)


def extract_field(value: Any, start: Any, size: Any) -> Any:
    """`size` bits from `start`, sign-extended for signed types."""
    bits = 8 * value.dtype.itemsize
    start = np.minimum(start & np.uint32(255), np.uint32(bits)).astype(np.int64)
    size = np.minimum(size & np.uint32(255), np.uint32(bits)).astype(np.int64)
    size = np.where(start + size > bits, bits - start, size) if value.dtype.kind == "u" else size
    wide = value.astype(np.int64) if value.dtype.kind == "i" else value.astype(np.uint64)
    shifted = wide >> start.astype(wide.dtype)
    room = np.minimum(64 - size, 63).astype(wide.dtype)
    result = np.where(size == 0, np.zeros_like(shifted), (shifted << room) >> room)
    return result.astype(value.dtype)


@instruction("bfi")
def bfi(e: Emitter, ins: Instruction) -> None:
    kind = raw(ins.type)
    a, b = (e.get(operand, kind) for operand in ins.operands[1:3])
    start, size = (e.get(operand, "u32") for operand in ins.operands[3:])
    e.put(ins.operands[0], e.call(insert_field, a, b, start, size), kind)


def insert_field(a: Any, b: Any, start: Any, size: Any) -> Any:
    bits = 8 * b.dtype.itemsize
    start = np.minimum(start & np.uint32(255), np.uint32(bits)).astype(np.uint64)
    size = np.minimum(size & np.uint32(255), np.uint32(bits)).astype(np.uint64)
    one = np.uint64(1)
    ones = np.where(size >= 64, ~np.uint64(0), (one << np.minimum(size, np.uint64(63))) - one)
    field = (ones << start).astype(b.dtype)
    return (b & ~field) | ((a.astype(np.uint64) << start).astype(b.dtype) & field)


@instruction("bmsk")
def bmsk(e: Emitter, ins: Instruction) -> None:
    start, size = (e.get(operand, "u32") for operand in ins.operands[1:])
    zero, ones = e.const(0, "u32"), e.const(0xFFFFFFFF, "u32")
    e.put(ins.operands[0], e.call(insert_field, ones, zero, start, size), "u32")


@instruction("lop3")
def lop3(e: Emitter, ins: Instruction) -> None:
    target, a, b, c, table = ins.operands
    assert isinstance(table, Imm)
    names = [e.get(operand, "u32") for operand in (a, b, c)]
    terms = []
    for index in range(8):
        if table.value >> index & 1:
            signs = [index >> 2 & 1, index >> 1 & 1, index & 1]
            parts = [n if sign else f"~{n}" for n, sign in zip(names, signs, strict=True)]
            terms.append("(" + " & ".join(parts) + ")")
    e.put(target, " | ".join(terms) or e.const(0, "u32"), "u32")


@instruction("prmt")
def prmt(e: Emitter, ins: Instruction) -> None:
    target, a, b, control = ins.operands
    if ins.mods != ("b32",):
        raise Unmodelled(e.text)
    names = (e.get(operand, "u32") for operand in (a, b, control))
    e.put(target, e.call(permute_bytes, *names), "u32")


def permute_bytes(a: Any, b: Any, control: Any) -> Any:
    """Each byte of the result is one of the eight of {b, a}, or its sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(both)
    for index in range(4):
        nibble = (control >> np.uint32(4 * index)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >= np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where((nibble & np.uint32(8)) != 0, sign, byte)
        result = result | (byte << np.uint64(8 * index))
    return result.astype(np.uint32)


@instruction("slct")
def slct(e: Emitter, ins: Instruction) -> None:
    target, a, b, c = ins.operands
    kind = raw(ins.mods[-2])
    test = e.get(c, storage(ins.mods[-1]))
    e.put(target, f"np.where({test} >= 0, {e.get(a, kind)}, {e.get(b, kind)})", kind)


@instruction("dp4a", "dp2a")
def unmodelled_dot(e: Emitter, ins: Instruction) -> None:
    raise Unmodelled(e.text)


@instruction("szext", "fns")
def unmodelled_bits(e: Emitter, ins: Instruction) -> None:
    raise Unmodelled(e.text)
