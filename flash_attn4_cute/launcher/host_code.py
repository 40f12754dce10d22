"""CuTe DSL's host code -> Program, by running it on symbols.

Before it becomes machine code, the host function of a kernel is a short program of MLIR's LLVM
dialect: integer arithmetic on pointers, sizes and strides, stores into local memory, and calls that
launch. It is run here with numbers where they are known and slots where they are not. What
remains of it are the steps that compute the parameters. Anything that this does not understand
raises `Untranslatable`: a launch is described exactly or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .control_flow import Block, exit_of, split_blocks
from .integers import NAMES, ceil_log2, operation
from .llvm_types import (
    LlvmType,
    Untranslatable,
    leaves,
    offset_of,
    parse_type,
    size_of,
    width_of,
)

MAX_TRANSFERS = 2000  # between blocks: host code has no long loops
_SAMPLES = [*range(1, 70), *(2**k + d for k in range(7, 31) for d in (-1, 0, 1))]
_PLAIN = re.compile(r"%[\w]+")
_FLAGS = re.compile(r"\b(overflow<[^>]*>|nneg|exact|disjoint|inbounds|nuw|nsw)\s*")


@dataclass(frozen=True, slots=True)
class Slot:
    """A number that is known at the launch only."""

    index: int


@dataclass(frozen=True, slots=True)
class Address:
    """A place in local memory of the host code."""

    memory: int
    offset: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a global, or what is stored there."""

    name: str


Value = Any  # int | Slot | Address | Symbol | None (undefined) | list[Value]


@dataclass
class Steps:
    """The steps found so far; equal ones are one."""

    num_inputs: int
    constants: dict[int, int] = field(default_factory=dict)
    found: dict[tuple, Slot] = field(default_factory=dict)

    def apply(self, name: str, width: int, to: int, operands: list[Value]) -> Value:
        """The result of an operation: a number if all operands are, else a slot."""
        if any(not isinstance(x, int | Slot) for x in operands):
            raise Untranslatable(f"{name} of {operands}")
        if all(isinstance(x, int) for x in operands):
            return operation(name, width, to)(*operands)
        if (name, width, to) == ("select", 1, 1) and operands[1:] == [1, 0]:
            return operands[0]
        key = (name, width, to, tuple(operands))
        return self.found.setdefault(key, Slot(-1 - len(self.found)))


@dataclass(slots=True)
class HostLaunch:
    """What a launch call was given."""

    kernel: str
    grid: list[Value]
    block: list[Value]
    shared_memory: Value
    attributes: list[tuple[int, tuple[int, ...]]]
    params: list[tuple[int, list[tuple[int, int, Value]]]]


class HostCode:
    """Runs one function. Its results are `launches` and `steps`."""

    def __init__(self, function: str, arguments: list[Value], steps: Steps):
        self.blocks: dict[str, Block] = split_blocks(function)
        self.steps = steps
        self.values: dict[str, Value] = {f"%arg{i}": x for i, x in enumerate(arguments)}
        self.memory: list[dict[int, tuple[int, Value]]] = []
        self.sizes: list[int] = []
        self.launches: list[HostLaunch] = []

    def run(self, start: str = "", end: str | None = None) -> list[Value]:
        """From block `start` until the function returns, or to block `end`: what is handed on."""
        label = start
        for _ in range(MAX_TRANSFERS):
            block = self.blocks[label]
            for line in block.body:
                self.step(line)
            target = self.transfer(block.last)
            if target is None:
                return []
            label, handed = target
            if label == end:
                return handed
            self.values.update(zip(self.blocks[label].arguments, handed, strict=True))
        raise Untranslatable("the host code loops")

    def transfer(self, line: str) -> tuple[str, list[Value]] | None:
        """The block that follows and what it is given; None where the function returns."""
        if line.startswith("return"):
            return None
        targets = [
            (name, [self.values[x] for x in _PLAIN.findall(given or "")])
            for name, given in re.findall(r"\^(bb\d+)(\([^)]*\))?", line)
        ]
        if line.startswith("br "):
            return targets[0]
        if not line.startswith("cond_br"):
            raise Untranslatable(line)
        condition = self.values[_PLAIN.findall(line)[0]]
        if isinstance(condition, int):
            return targets[0 if condition else 1]
        return self.decide_by_samples(condition, targets)

    def decide_by_samples(self, condition: Slot, targets: list) -> tuple[str, list[Value]]:
        """A branch on an unknown number: the loop that finds a binary logarithm, or nothing."""
        name, _, _, operands = next(k for k, s in self.steps.found.items() if s == condition)
        unknown = [x for x in operands if isinstance(x, Slot)]
        end = exit_of(self.blocks, [label for label, _ in targets])
        if name != "eq" or len(unknown) != 1 or len(self.blocks[end].arguments) != 1:
            raise Untranslatable(f"a branch on {name} of {operands}")
        (number,) = unknown
        known = next(x for x in operands if isinstance(x, int))
        for sample in _SAMPLES:
            trial = HostCode("", [], self.steps)
            trial.blocks = self.blocks
            trial.values = {k: sample if v == number else v for k, v in self.values.items()}
            label, handed = targets[0 if sample == known else 1]
            trial.values.update(zip(self.blocks[label].arguments, handed, strict=True))
            result = handed if label == end else trial.run(label, end)
            if trial.memory or trial.launches or result != [ceil_log2(sample)]:
                raise Untranslatable(f"a branch on {name} of {operands} that is no logarithm")
        return end, [self.steps.apply("ceil_log2", 32, 8, [number])]

    def step(self, line: str) -> None:
        """One operation that does not end a block."""
        result, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        # Some operations print in MLIR's generic form, with a name in quotes.
        text = re.sub(r"^\"([\w.]+)\"", r"\1", text)
        name = text.split("(")[0].split(" ")[0]
        text = _FLAGS.sub("", text[len(name) :]).strip()
        handler = _HANDLERS.get(name)
        if handler is not None:
            value = handler(self, text)
        elif name.removeprefix("intr.") in NAMES:
            value = self.arithmetic(name.removeprefix("intr."), text)
        else:
            raise Untranslatable(line)
        if result:
            self.values[result] = value

    def operands(self, text: str) -> list[Value]:
        """The values that `text` names, up to the types."""
        return [self.values[x] for x in _PLAIN.findall(text.rpartition(" : ")[0])]

    def arithmetic(self, name: str, text: str) -> Value:
        values, types = text.rpartition(" : ")[::2]
        operands = [self.values[x] for x in _PLAIN.findall(values)]
        if name in ("zext", "sext", "trunc"):
            source, target = types.split(" to ")
            return self.steps.apply(name, _width(source), _width(target), operands)
        if name == "select":
            width = _width(types.split(",")[-1])
            if any(not isinstance(x, int | Slot) for x in operands[1:]):
                if not isinstance(operands[0], int):
                    raise Untranslatable(f"select {text}")
                return operands[1 if operands[0] else 2]
            return self.steps.apply(name, width, width, operands)
        width = _width(types.strip("() ").split(",")[0])
        return self.steps.apply(name, width, width, operands)

    def compare(self, text: str) -> Value:
        predicate = text.split('"')[1]
        return self.steps.apply(
            predicate, _width(text.rpartition(" : ")[2]), 1, self.operands(text)
        )

    def constant(self, text: str) -> Value:
        match = re.match(r"\((-?\d+|true|false)(?: : (i\d+))?\)", text)
        if match is None:
            raise Untranslatable(f"constant{text[:80]}")
        if match.group(1) in ("true", "false"):
            return int(match.group(1) == "true")
        return int(match.group(1)) & (1 << _width(match.group(2) or "i64")) - 1

    def undefined(self, text: str) -> Value:
        return _undefined(parse_type(text.partition(" : ")[2] or text.lstrip(": ")))

    def zero(self, text: str) -> Value:
        return 0

    def address_of(self, text: str) -> Value:
        return Symbol(text.partition("@")[2].partition(" : ")[0].strip('"'))

    def extract(self, text: str) -> Value:
        found = self.operands(text)[0]
        for index in _position(text):
            found = found[index]
        return found

    def insert(self, text: str) -> Value:
        value, whole = self.operands(text)
        return _replaced(whole, _position(text), value)

    def allocate(self, text: str) -> Value:
        count, element = text.split(" x ", 1)
        number = self.values[count]
        kind = parse_type(re.split(r" \{| : ", element)[0])
        if not isinstance(number, int):
            raise Untranslatable(f"alloca {text}")
        self.memory.append({})
        self.sizes.append(number * size_of(kind))
        return Address(len(self.memory) - 1, 0)

    def element(self, text: str) -> Value:
        base, indices = re.match(r"(%\w+)\[([^\]]*)\]", text).groups()  # type: ignore[union-attr]
        kind: LlvmType = parse_type(re.split(r"-> !ptr(?:<\d+>)?, ", text)[1])
        numbers = [self.values[x] if x.startswith("%") else int(x) for x in indices.split(", ")]
        pointer = self.values[base]
        if not isinstance(pointer, Address):
            if len(numbers) != 1:
                raise Untranslatable(f"getelementptr {text}")
            distance = self.steps.apply("mul", 64, 64, [numbers[0], size_of(kind)])
            return self.steps.apply("add", 64, 64, [pointer, distance])
        if any(not isinstance(x, int) for x in numbers):
            raise Untranslatable(f"getelementptr {text}")
        offset = pointer.offset + numbers[0] * size_of(kind)
        for index in numbers[1:]:
            offset += offset_of(kind, index)
            kind = kind[index]
        return Address(pointer.memory, offset)

    def same(self, text: str) -> Value:
        return self.operands(text)[0]

    def store(self, text: str) -> None:
        value, address = self.operands(text)
        if not isinstance(address, Address):
            raise Untranslatable(f"store {text}")
        kind = parse_type(text.rpartition(" : ")[2])
        cells = self.memory[address.memory]
        for (offset, scalar), leaf in zip(leaves(kind), _flat(value, kind), strict=True):
            cells[address.offset + offset] = (size_of(scalar), leaf)

    def load(self, text: str) -> Value:
        address = self.operands(text)[0]
        if isinstance(address, Symbol):
            return address
        if not isinstance(address, Address):
            raise Untranslatable(f"load {text}")
        kind = parse_type(text.rpartition("-> ")[2])
        cells = iter([self.cell(address, at, scalar) for at, scalar in leaves(kind)])
        return _shaped(kind, cells)

    def cell(self, address: Address, offset: int, scalar: str) -> Value:
        size, value = self.memory[address.memory].get(address.offset + offset, (None, None))
        if size not in (None, size_of(scalar)):
            raise Untranslatable(f"{scalar} read where {size} bytes were written")
        return value

    def word(self, address: Address, offset: int, scalar: str = "i32") -> Value:
        return self.cell(address, offset, scalar)

    def call(self, text: str) -> Value:
        name = text.partition("@")[2].partition("(")[0]
        if name != "_cudaLaunchKernelEx":
            raise Untranslatable(f"a call of {name}")
        config, kernel, params = self.operands(text.partition("@")[2].partition("(")[2])
        number = self.word(config, 48)
        table = self.word(config, 40, "ptr")
        attributes = [
            (self.word(table, 72 * i), self._attribute(table, 72 * i)) for i in range(number)
        ]
        self.launches.append(
            HostLaunch(
                kernel.name.removeprefix("kernels_"),
                [self.word(config, 4 * i) for i in range(3)],
                [self.word(config, 12 + 4 * i) for i in range(3)],
                self.word(config, 24, "i64"),
                [(number, words) for number, words in attributes if any(words)],
                [self._param(params, i) for i in range(self.sizes[params.memory] // 8)],
            )
        )
        return 0

    def _attribute(self, table: Address, at: int) -> tuple[int, ...]:
        """A launch attribute's value, as 32-bit words."""
        first = table.offset + at + 8
        cells = self.memory[table.memory]
        found = {offset - first: cell for offset, cell in cells.items() if 0 <= offset - first < 64}
        places = [4 * i for i in range(len(found))]
        words = [value for at, (size, value) in sorted(found.items()) if size == 4]
        if sorted(found) != places or any(not isinstance(word, int) for word in words):
            raise Untranslatable(f"a launch attribute of {found}")
        return tuple(words)

    def _param(self, params: Address, index: int) -> tuple[int, list[tuple[int, int, Value]]]:
        address = self.word(params, 8 * index, "ptr")
        cells = self.memory[address.memory]
        return self.sizes[address.memory], [
            (offset, size, value) for offset, (size, value) in sorted(cells.items())
        ]


_HANDLERS = {
    "mlir.constant": HostCode.constant,
    "mlir.poison": HostCode.undefined,
    "mlir.undef": HostCode.undefined,
    "mlir.zero": HostCode.zero,
    "mlir.addressof": HostCode.address_of,
    "extractvalue": HostCode.extract,
    "insertvalue": HostCode.insert,
    "alloca": HostCode.allocate,
    "getelementptr": HostCode.element,
    "ptrtoint": HostCode.same,
    "inttoptr": HostCode.same,
    "store": HostCode.store,
    "load": HostCode.load,
    "call": HostCode.call,
    "icmp": HostCode.compare,
}


def _width(text: str) -> int:
    return width_of(parse_type(text))


def _position(text: str) -> list[int]:
    return [int(x) for x in text.partition("[")[2].partition("]")[0].split(",")]


def _undefined(kind: LlvmType) -> Value:
    return None if isinstance(kind, str) else [_undefined(member) for member in kind]


def _replaced(whole: Value, position: list[int], value: Value) -> Value:
    if not position:
        return value
    first, *rest = position
    return [_replaced(x, rest, value) if i == first else x for i, x in enumerate(whole)]


def _flat(value: Value, kind: LlvmType) -> Iterator[Value]:
    if isinstance(kind, str):
        yield value
    else:
        for part, member in zip(value, kind, strict=True):
            yield from _flat(part, member)


def _shaped(kind: LlvmType, cells: Iterator[Value]) -> Value:
    return next(cells) if isinstance(kind, str) else [_shaped(member, cells) for member in kind]
