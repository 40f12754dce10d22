"""Moves, selections and predicates: mov, selp, setp, cvta, isspacep."""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..machine.memory import LOCAL_BASE, SHARED_BASE
from ..ptx.emit import Emitter, Value
from ..ptx.syntax import Imm, Instruction, Not, Pair, Reg, Vector
from .registry import instruction

_STORE = {"8": "u8", "16": "u16", "32": "u32", "64": "u64"}


def storage(kind: str) -> str:
    """The NumPy type in which values of a PTX type are handled."""
    if kind == "pred":
        return "b1"
    if kind in ("f16", "f32", "f64"):
        return kind
    digits = kind.lstrip("bufsx")
    if kind.startswith("s"):
        return f"s{digits}"
    if kind in ("f16x2", "bf16x2"):
        return "u32"
    if kind in ("bf16",):
        return "u16"
    if kind == "f32x2":
        return "u64"
    return _STORE[digits]


def raw(kind: str) -> str:
    """The unsigned type of the same size."""
    name = storage(kind)
    return name if name == "b1" else "u" + name[1:]


@instruction("mov")
def mov(e: Emitter, ins: Instruction) -> None:
    target, source = ins.operands
    if isinstance(target, Vector):
        _unpack(e, target, source)
    elif isinstance(source, Vector) and ins.type == "b128":
        e.put_value(target, pair_of_64(e, source))
    elif isinstance(source, Vector):
        _pack(e, target, source)
    elif isinstance(source, Reg):
        e.put_value(target, e.value(source))
    else:
        kind = raw(ins.type)
        if isinstance(source, Imm) and source.float_bits and kind in ("u32", "u64"):
            kind = "f" + kind[1:]
        e.put_value(target, Value({kind: e.get(source, kind)}))


def _unpack(e: Emitter, target: Vector, source: Any) -> None:
    items = target.items
    if len(items) == 2 and e.instruction is not None and e.instruction.type.endswith("64"):
        for item, half in zip(items, e.halves(source), strict=True):
            e.put_value(item, half)
        return
    whole_bits = int(e.instruction.type[1:]) if e.instruction else 0
    bits = whole_bits // len(items)
    whole = e.get(source, f"u{whole_bits}")
    for index, item in enumerate(items):
        shift = e.const(bits * index, f"u{whole_bits}")
        e.put(item, f"({whole} >> {shift}).astype(D_u{bits})", f"u{bits}")


def _pack(e: Emitter, target: Any, source: Vector) -> None:
    assert e.instruction is not None
    items = source.items
    whole_bits = int(e.instruction.type[1:])
    bits = whole_bits // len(items)
    if whole_bits == 64 and len(items) == 2:
        pair = Value()
        pair.pair = (e.operand_value(items[0]), e.operand_value(items[1]))
        e.put_value(target, pair)
        return
    parts = []
    for index, item in enumerate(items):
        part = e.get(item, f"u{bits}")
        shift = e.const(bits * index, f"u{whole_bits}")
        parts.append(f"({part}.astype(D_u{whole_bits}) << {shift})")
    e.put(target, " | ".join(parts), f"u{whole_bits}")


def pair_of_64(e: Emitter, source: Vector) -> Value:
    """A 128-bit value as its halves; it lives within a block only."""
    value, (low, high) = Value(), source.items
    value.pair = (Value({"u64": e.get(low, "u64")}), Value({"u64": e.get(high, "u64")}))
    return value


@instruction("selp")
def selp(e: Emitter, ins: Instruction) -> None:
    target, a, b, condition = ins.operands
    kind = "f32" if ins.type == "f32" else raw(ins.type)
    chosen = e.call(choose, e.get(condition, "b1"), e.get(a, kind), e.get(b, kind))
    e.put(target, chosen, kind)


def choose(condition: Any, a: Any, b: Any) -> Any:
    """a where condition, else b, a scalar if all are."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)
    return a if condition else b


_ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<="}
_ORDERED |= {"hi": ">", "hs": ">="}
_NEGATED = {"neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def comparison(e: Emitter, ins: Instruction, a: str, b: str) -> str:
    """Expression of the comparison that a setp or set asks for."""
    operator = ins.mods[0]
    floating = ins.type in ("f16", "bf16", "f32", "f64")
    if operator == "ne":
        return f"(({a} < {b}) | ({a} > {b}))" if floating else f"({a} != {b})"
    if operator in _ORDERED:
        return f"({a} {_ORDERED[operator]} {b})"
    if operator in _NEGATED:
        return f"(~({a} {_NEGATED[operator]} {b}))" if operator != "neu" else f"({a} != {b})"
    if operator == "equ":
        return f"(~(({a} < {b}) | ({a} > {b})))"
    if operator == "nan":
        return f"(({a} != {a}) | ({b} != {b}))"
    if operator == "num":
        return f"(({a} == {a}) & ({b} == {b}))"
    raise Unmodelled(e.text)


@instruction("setp")
def setp(e: Emitter, ins: Instruction) -> None:
    target, left, right, *rest = ins.operands
    kind = storage(ins.type)
    if ins.type == "bf16":
        a, b = (e.temp(e.call(widen_bf16, e.get(x, "u16"))) for x in (left, right))
    else:
        a, b = e.get(left, kind), e.get(right, kind)
    result = e.temp(comparison(e, ins, a, b))
    combine = next((m for m in ins.mods[1:] if m in ("and", "or", "xor")), None)
    operator = {"and": "&", "or": "|", "xor": "^"}.get(combine or "", "")
    other = e.get(rest[0], "b1") if rest else ""
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    if second is not None:
        e.put(second, f"(~{result}) {operator} {other}" if operator else f"~{result}", "b1")
    e.put(first, f"{result} {operator} {other}" if operator else result, "b1")


def widen_bf16(bits: Any) -> Any:
    """bf16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@instruction("and", "or", "xor", types="pred")
def logic_pred(e: Emitter, ins: Instruction) -> None:
    target, a, b = ins.operands
    operator = {"and": "&", "or": "|", "xor": "^"}[ins.opcode]
    e.put(target, f"{e.get(a, 'b1')} {operator} {e.get(b, 'b1')}", "b1")


@instruction("not", types="pred")
def not_pred(e: Emitter, ins: Instruction) -> None:
    target, source = ins.operands
    if isinstance(source, Not):
        e.put_value(target, e.value(source.reg))
    else:
        e.put(target, f"~{e.get(source, 'b1')}", "b1")


@instruction("cvta")
def cvta(e: Emitter, ins: Instruction) -> None:
    target, source = ins.operands
    kind = raw(ins.type)
    if ins.has("shared", "shared::cta", "shared::cluster"):
        base = e.const(SHARED_BASE, "u64")
    elif ins.has("local"):
        base = e.const(LOCAL_BASE, "u64")
    else:  # global and param addresses are generic ones already
        e.put(target, e.get(source, kind), kind)
        return
    e.put(target, f"{e.get(source, 'u64')} {'-' if ins.has('to') else '+'} {base}", "u64")


@instruction("isspacep")
def isspacep(e: Emitter, ins: Instruction) -> None:
    target, address = ins.operands
    spaces = {"global": 0, "shared": 1, "const": 0, "local": 3}
    number = e.const(spaces[ins.mods[0].split("::")[0]], "u64")
    e.put(target, f"({e.get(address, 'u64')} >> {e.const(56, 'u64')}) == {number}", "b1")
