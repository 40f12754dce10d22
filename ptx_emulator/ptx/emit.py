"""Writes the Python function of one basic block.

Instruction handlers call `get` for operands, `put` for results and `call` for run-time functions.
Within a block registers are local variables, each kept in every NumPy type it was asked for, so
reinterpreting bits costs nothing when repeated. Pairs of 32-bit registers that travel in a 64-bit
one (for f32x2) are put together only when something reads all 64 bits.

The generated function takes (g, R), the gang and its registers, and returns the next block.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..findings import Unmodelled
from ..machine.memory import PARAM_BASE
from .flow import Block
from .syntax import Address, Imm, Instruction, Not, Operand, Reg, Special, Symbol, Vector

if TYPE_CHECKING:
    from .program import Program

DTYPES: dict[str, Any] = {
    "b1": np.bool_,
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}
BITS = {name: 8 * np.dtype(dtype).itemsize for name, dtype in DTYPES.items()} | {"b1": 1}


class Value:
    """A value in the block: a variable for each type, or a pair, or a recipe to make it."""

    __slots__ = ("forms", "make", "pair", "tag")

    def __init__(self, forms: dict[str, str] | None = None) -> None:
        self.forms = forms or {}
        self.pair: tuple[Value, Value] | None = None
        self.make: Callable[[], tuple[str, str]] | None = None  # -> (expression, dtype)
        self.tag: Any = None  # for instruction classes, e.g. whose matrix it is an element of


def pack64(low: Any, high: Any) -> Any:
    """Two uint32 as one uint64."""
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


def low32(value: Any) -> Any:
    return value.astype(np.uint32)


def high32(value: Any) -> Any:
    return (value >> np.uint64(32)).astype(np.uint32)


def select(condition: Any, new: Any, old: Any) -> Any:
    """`new` where `condition`, else `old`; `new` everywhere if there is no old value."""
    if old is None:
        return new
    if not isinstance(condition, np.ndarray):
        return new if condition else old
    return np.where(condition, new, old)


class Emitter:
    """The function under construction. `masked`: some lanes do not take part."""

    def __init__(self, program: "Program", block: Block, masked: bool) -> None:
        self.program = program
        self.block = block
        self.masked = masked
        self.lines: list[str] = ["m = g.mask"] if masked else []
        self.values: dict[int, Value] = {}
        self.dirty: dict[int, Reg] = {}
        self.names = 0
        self.instruction: Instruction | None = None
        self.cache: dict[Any, Any] = {}  # common subexpressions of instruction classes
        self.returned = False
        self._mask: str | None = None

    # ---- writing code ----
    def begin(self, instruction: Instruction) -> None:
        """Start of an instruction; its guard holds for what follows."""
        self.instruction = instruction
        self._mask = "m" if self.masked else None
        if instruction.guard is not None:
            guard = self.get(instruction.guard, "b1")
            if instruction.guard_negated:
                guard = self.temp(f"~{guard}")
            self._mask = self.temp(f"{guard} & m") if self.masked else guard

    def line(self, text: str) -> None:
        self.lines.append(text)

    def temp(self, expression: str) -> str:
        """A new local variable."""
        name = f"v{self.names}"
        self.names += 1
        self.lines.append(f"{name} = {expression}")
        return name

    def name_of(self, thing: Any, prefix: str) -> str:
        """A name in the program's namespace for a run-time function or a constant."""
        name = f"{prefix}_{getattr(thing, '__name__', id(thing))}"
        namespace = self.program.namespace
        if namespace.setdefault(name, thing) is not thing:
            name = f"{name}_{id(thing)}"
            namespace[name] = thing
        return name

    def call(self, function: Callable[..., Any], *arguments: str) -> str:
        """Expression that calls a run-time function."""
        return f"{self.name_of(function, 'rt')}({', '.join(arguments)})"

    def const(self, value: Any, dtype: str) -> str:
        """A constant as a NumPy scalar."""
        scalar = np.array(value).astype(DTYPES[dtype])[()]
        bits = scalar.tobytes().hex()
        name = f"K_{dtype}_{bits}"
        self.program.namespace[name] = scalar
        return name

    @property
    def mask(self) -> str:
        """Expression of the lanes that execute the instruction: None means all."""
        return self._mask or "None"

    # ---- operands ----
    def get(self, operand: Operand | None, dtype: str) -> str:
        """Variable or constant that holds an operand as `dtype`."""
        match operand:
            case Reg():
                return self.view(self.value(operand), dtype)
            case Imm(value, float_bits):
                return self._immediate(value, float_bits, dtype)
            case Not(reg):
                return self.temp(f"~{self.view(self.value(reg), 'b1')}")
            case Special(name):
                return self._special(name, dtype)
            case Symbol(name):
                return self._symbol(name, dtype)
            case Vector(items) if len(items) == 2 and BITS[dtype] == 64:
                pair = Value()
                pair.pair = (self.operand_value(items[0]), self.operand_value(items[1]))
                return self.view(pair, dtype)
        raise Unmodelled(f"operand {operand} of: {self.text}")

    @property
    def text(self) -> str:
        assert self.instruction is not None
        return f"line {self.instruction.line}: {self.instruction.text}"

    def value(self, reg: Reg) -> Value:
        """The current value of a register."""
        if reg.index not in self.values:
            dtype = self.program.dtypes[reg.index]
            if reg.index in self.program.never_written:
                held = self._immediate(-1, 0, dtype)
            else:
                held = self.temp(f"R[{reg.index}]")
            self.values[reg.index] = Value({dtype: held})
        return self.values[reg.index]

    def operand_value(self, operand: Operand | None) -> Value:
        """A 32-bit operand as a Value that can go into a pair."""
        if isinstance(operand, Reg):
            return self.value(operand)
        return Value({"u32": self.get(operand, "u32")})

    def view(self, value: Value, dtype: str) -> str:
        """A variable that holds `value` as `dtype`."""
        if dtype in value.forms:
            return value.forms[dtype]
        if value.make is not None and not value.forms:
            expression, made = value.make()
            value.forms[made] = self.temp(expression)
            return self.view(value, dtype)
        if value.pair is not None and not value.forms:
            low, high = (self.view(part, "u32") for part in value.pair)
            value.forms["u64"] = self.temp(self.call(pack64, low, high))
            return self.view(value, dtype)
        have, name = next(iter(value.forms.items()))
        if BITS[have] == BITS[dtype]:
            expression = f"{name}.view(D_{dtype})"
        else:  # 8-bit values live in 16-bit registers; wider results keep their low bits
            expression = f"{name}.astype(D_{dtype})"
        value.forms[dtype] = self.temp(expression)
        return value.forms[dtype]

    def halves(self, operand: Operand | None) -> tuple[Value, Value]:
        """A 64-bit operand as its two 32-bit halves."""
        if isinstance(operand, Vector):
            first, second = operand.items
            return self.operand_value(first), self.operand_value(second)
        if isinstance(operand, Reg):
            value = self.value(operand)
            if value.pair is None:
                whole = self.view(value, "u64")
                value.pair = (
                    Value({"u32": self.temp(self.call(low32, whole))}),
                    Value({"u32": self.temp(self.call(high32, whole))}),
                )
            return value.pair
        assert isinstance(operand, Imm)
        low, high = operand.value & 0xFFFFFFFF, operand.value >> 32 & 0xFFFFFFFF
        return Value({"u32": self.const(low, "u32")}), Value({"u32": self.const(high, "u32")})

    def _immediate(self, value: int, float_bits: int, dtype: str) -> str:
        if dtype == "b1":
            return self.const(bool(value), "b1")
        bits = BITS[dtype]
        if float_bits:
            source = np.array(value, f"u{float_bits // 8}").view(f"f{float_bits // 8}")
            if dtype[0] == "f":
                return self.const(source, dtype)
            value = int(source.astype(f"f{bits // 8}").view(f"u{bits // 8}"))
        elif dtype[0] == "f":
            raw = np.array(value & (1 << bits) - 1, f"u{bits // 8}")
            return self.const(raw.view(f"f{bits // 8}"), dtype)
        unsigned = np.array(value & (1 << bits) - 1, f"u{bits // 8}")
        return self.const(unsigned.view(DTYPES[dtype]), dtype)

    def _special(self, name: str, dtype: str) -> str:
        wide = BITS[dtype] == 64
        held = "u64" if name.startswith(("clock64", "globaltimer")) and "_" not in name else "u32"
        value = Value({held: self.temp(f"g.special({name!r})")})
        if wide and held == "u32":
            value = Value({"u64": self.temp(f"{value.forms['u32']}.astype(D_u64)")})
        return self.view(value, dtype)

    def _symbol(self, name: str, dtype: str) -> str:
        program = self.program
        if name in program.shared_offsets:
            offset = self.const(program.shared_offsets[name], "u32")
            return self.view(Value({"u32": self.temp(f"{offset} + g.cta.shared_base")}), dtype)
        if name in program.param_offsets:
            return self.const(PARAM_BASE + program.param_offsets[name], dtype)
        if name in program.local_offsets:
            return self.const(program.local_offsets[name], dtype)
        if name in program.global_data:
            return self.const(program.global_data[name].ctypes.data, dtype)
        raise Unmodelled(f"symbol {name} in: {self.text}")

    def address(self, operand: Operand | None, dtype: str) -> str:
        """base + offset of an address operand, as u32 (shared, tensor) or u64 (others)."""
        assert isinstance(operand, Address), self.text
        base = self.get(operand.base, dtype)
        if isinstance(operand.base, Reg) and operand.base.type == "b32" and dtype == "u64":
            base = self.temp(f"{base}.astype(D_u64)")
        if operand.offset == 0:
            return base
        key = ("address", base, operand.offset)
        if key not in self.cache:
            offset = self._immediate(operand.offset, 0, dtype)
            self.cache[key] = self.temp(f"{base} + {offset}")
        return self.cache[key]

    # ---- results ----
    def put(self, operand: Operand | None, expression: str, dtype: str) -> None:
        """Write a register, in the lanes that the guard lets."""
        if operand is None:
            return
        self.put_value(operand, Value({dtype: self.temp(expression)}))

    def put_value(self, operand: Operand | None, value: Value) -> None:
        """Write a register with a Value, without copying it unless there is a guard."""
        if operand is None:
            return
        assert isinstance(operand, Reg), self.text
        assert self.instruction is not None
        if self.instruction.guard is not None:
            dtype = self.program.dtypes[operand.index]
            if operand.index in self.values:
                old = self.view(self.values[operand.index], dtype)
            else:
                old = self.temp(f"R[{operand.index}]")
            new = self.view(value, dtype)
            value = Value({dtype: self.temp(self.call(select, self._mask or "", new, old))})
        self.values[operand.index] = value
        self.dirty[operand.index] = operand

    def put_each(self, operands: Sequence[Operand | None], expression: str, dtype: str) -> None:
        """Write several registers from an expression that yields one value for each."""
        whole = self.temp(expression)
        for index, operand in enumerate(operands):
            self.put(operand, f"{whole}[{index}]", dtype)

    def leave(self, expression: str) -> None:
        """End the block by returning an expression (the next block); for instructions that wait."""
        self._write_back()
        self.line(f"return {expression}")
        self.returned = True

    # ---- the end ----
    def _write_back(self) -> None:
        live = self.block.live_out
        for index in self.dirty:
            if index not in live:
                continue
            if self.program.dtypes[index] == "b128":
                raise Unmodelled(f"a 128-bit register that outlives its block, {self.text}")
            name = self.view(self.values[index], self.program.dtypes[index])
            if self.masked:
                name = self.call(select, "m", name, f"R[{index}]")
            self.line(f"R[{index}] = {name}")

    def finish(self) -> str:
        """The function's source."""
        if not self.returned:
            condition = self._branch_condition()
            self._write_back()
            self.line(self._next(condition))
        body = "\n    ".join(self.lines)
        return f"def block(g, R):\n    {body}\n"

    def _branch_condition(self) -> str:
        branch = self.block.branch
        if branch is None or branch.guard is None or len(set(self.block.targets)) < 2:
            return ""
        condition = self.view(self.value(branch.guard), "b1")
        return self.temp(f"~{condition}") if branch.guard_negated else condition

    def _next(self, condition: str) -> str:
        block = self.block
        if not condition:
            return f"return {block.targets[0]}"
        taken, other = block.targets
        if block.spins:
            again = condition if taken == block.index else f"~{condition}"
            after = other if taken == block.index else taken
            return f"return g.spin({again}, {after}, {block.index})"
        general = (
            f"g.branch({condition}, {block.targets}, {block.reconverge}, {block.region_waits})"
        )
        if self.masked:
            return f"return {general}"
        uniform = f"({taken} if {condition} else {other})"
        return f"return {general} if isinstance({condition}, ndarray) else {uniform}"
