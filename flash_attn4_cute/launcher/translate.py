"""From what CuTe DSL compiled to what is kept of it: a cubin and the Program of its launches."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .host_code import HostCode, HostLaunch, Slot, Steps, Value
from .llvm_types import LlvmType, Untranslatable, parse_type, width_of
from .program import (
    FLOAT32,
    INT32,
    POINTER,
    SHAPE,
    STRIDE,
    Field,
    Input,
    KernelAttribute,
    Launch,
    Program,
    Step,
)

_FATBIN, _ELF, _ELF_KIND = 0xBA55ED50, b"\x7fELF", 2
# CUfunction_attribute: the numbers are the same in the driver and in the runtime.
MAX_DYNAMIC_SHARED = 8


def translate(module: str, arguments: tuple) -> tuple[bytes, Program]:
    """The cubin in a compiled module, and its launches.

    Args:
        module: text of the module in MLIR's LLVM dialect, as CuTe DSL's compiler leaves it.
        arguments: the stand-ins that the kernel was traced with.

    Raises:
        Untranslatable: the host code does what no Program can say.
    """
    text = module.replace("!llvm.", "!").replace("llvm.", "")
    functions = dict(_functions(text))
    entry = next((f for f in functions.values() if "@_cudaLaunchKernelEx(" in f), None)
    if entry is None:
        raise Untranslatable("no function launches a kernel")
    types = _argument_types(entry)
    inputs, values = _inputs(arguments, types)
    host = HostCode(entry, values, Steps(len(inputs)))
    host.run()
    attributes = _kernel_attributes(functions["cuda_load_to_device"])
    return _cubin(text), _assemble(inputs, host, attributes)


def _functions(text: str):
    """(name, text) of the functions with a body."""
    for match in re.finditer(
        r"^  func (?:internal )?@(\w+)\([^\n]*\{\n.*?^  \}", text, re.M | re.S
    ):
        yield match.group(1), match.group()


def _argument_types(function: str) -> list[LlvmType]:
    head = function.split("\n", 1)[0]
    return [parse_type(part) for part in re.split(r"%arg\d+: ", head)[1:]]


def _inputs(arguments: tuple, types: list[LlvmType]) -> tuple[list[Input], list[Value]]:
    """What the host function reads of its arguments; the last is the stream."""
    inputs: list[Input] = []
    values: list[Value] = []
    leaves = list(_leaves(arguments))
    if len(leaves) + 1 != len(types):
        raise Untranslatable(f"{len(leaves)} arguments and a stream became {len(types)}")
    for (path, leaf), kind in zip(leaves, types, strict=False):
        found = _inputs_of(path, leaf)
        numbers = iter(range(len(inputs), len(inputs) + len(found)))
        inputs += [
            Input(i.path, i.kind, w, i.dim) for i, w in zip(found, _widths(kind), strict=True)
        ]
        values.append(_slots(kind, numbers))
    return inputs, [*values, 0]


def _leaves(value: Any, path: tuple[int, ...] = ()):
    """The tensors and numbers in nested tuples, as the compiler flattens them."""
    if isinstance(value, tuple):
        for i, member in enumerate(value):
            yield from _leaves(member, (*path, i))
    elif value is not None:
        yield path, value


def _inputs_of(path: tuple[int, ...], leaf: Any) -> list[Input]:
    if not hasattr(leaf, "stride"):
        kind = FLOAT32 if type(leaf).__name__ == "Float32" else INT32
        return [Input(path, kind, 32)]
    dims = [
        Input(path, kind, 0, dim)
        for kind, extents in ((SHAPE, leaf.shape), (STRIDE, leaf.stride))
        for dim, extent in enumerate(extents)
        if not isinstance(extent, int)
    ]
    return [Input(path, POINTER, 64), *dims]


def _widths(kind: LlvmType) -> list[int]:
    if isinstance(kind, str):
        return [width_of(kind)]
    return [width for member in kind for width in _widths(member)]


def _slots(kind: LlvmType, numbers: Any) -> Value:
    if isinstance(kind, str):
        return Slot(next(numbers))
    return [_slots(member, numbers) for member in kind]


def _kernel_attributes(loader: str) -> tuple[KernelAttribute, ...]:
    """What CuTe DSL's loader sets for each kernel; see `KernelAttribute`."""
    values: dict[str, str] = {}
    kernel, found = "", []
    for line in loader.splitlines():
        result, _, text = line.strip().partition(" = ")
        values[result] = text
        name = re.match(r"mlir.addressof @kernels_(\w+) :", text)
        if name is not None and name.group(1) != "binary":
            kernel = name.group(1)
        call = re.search(r"@_cudaKernelSetAttributeForDevice\((.*?)\)", text)
        if call is not None:
            _, number, value, _ = call.group(1).split(", ")
            constant = re.match(r"mlir.constant\((-?\d+) ", values[value])
            attribute = int(re.findall(r"\((-?\d+) ", values[number])[0])
            if constant is None and attribute != MAX_DYNAMIC_SHARED:
                raise Untranslatable(f"attribute {attribute} of {kernel} is computed")
            number_or_most = int(constant.group(1)) if constant is not None else None
            found.append(KernelAttribute(kernel, attribute, number_or_most))
    return tuple(found)


def _assemble(
    inputs: list[Input], host: HostCode, attributes: tuple[KernelAttribute, ...]
) -> Program:
    """Number what the launches need: inputs, constants, steps."""
    needed, order = _needed(host)
    used = [i for i in range(len(inputs)) if Slot(i) in needed]
    constants = sorted({x for x in needed if isinstance(x, int)})
    numbered: dict[Value, int] = {Slot(old): new for new, old in enumerate(used)}
    numbered |= {x: len(used) + i for i, x in enumerate(constants)}
    first = len(used) + len(constants)
    numbered |= {slot: first + i for i, (_, slot) in enumerate(order)}
    steps = tuple(
        Step(name, width, to, tuple(numbered[x] for x in operands))
        for (name, width, to, operands), _ in order
    )
    launches = tuple(_launch(launch, numbered) for launch in host.launches)
    kept = tuple(inputs[i] for i in used)
    program = Program(kept, tuple(constants), steps, launches, attributes, (), ())
    follows, decisive = _pointers(program)
    return replace(program, follows=follows, decisive=decisive)


def _needed(host: HostCode) -> tuple[set[Value], list[tuple[tuple, Slot]]]:
    needed: set[Value] = set()
    for launch in host.launches:
        needed.update(launch.grid, launch.block)
        needed.update(v for _, fields in launch.params for *_, v in fields if v is not None)
    order = []
    for key, slot in reversed(host.steps.found.items()):
        if slot in needed:
            needed.update(key[3])
            order.append((key, slot))
    return needed, order[::-1]


def _launch(launch: HostLaunch, numbered: dict[Value, int]) -> Launch:
    if not isinstance(launch.shared_memory, int):
        raise Untranslatable("shared memory is computed")
    return Launch(
        launch.kernel,
        tuple(numbered[x] for x in launch.grid),  # type: ignore[arg-type]
        tuple(numbered[x] for x in launch.block),  # type: ignore[arg-type]
        launch.shared_memory,
        tuple(launch.attributes),
        tuple(
            (
                size,
                tuple(Field(at, width, numbered[v]) for at, width, v in fields if v is not None),
            )
            for size, fields in launch.params
        ),
    )


def _pointers(program: Program) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """What follows addresses and which decide more, see `Program`; tried out with addresses."""
    pointers = [i for i, found in enumerate(program.inputs) if found.kind == POINTER]
    moving = set(pointers)
    first = len(program.inputs) + len(program.constants)
    for slot, step in enumerate(program.steps, first):
        if moving.intersection(step.operands):
            moving.add(slot)
    stored = {f.slot for launch in program.launches for _, fields in launch.params for f in fields}
    for launch in program.launches:
        stored.update(launch.grid, launch.block)
    evaluate = program.evaluator()
    # Heads are divided by those that share tiles, 128 at most, and what remains divides.
    size = 48 * 128
    base = [1 << 40 if i in pointers else size for i in range(len(program.inputs))]
    before = evaluate(base)
    found, decisive = [], set()
    for slot in sorted(stored & moving):
        sources, follows = set(), True
        for i in pointers:
            for shift in (16, 0x12340, 0x7FFF_FFFF_FFF0 - base[i]):
                moved = evaluate([x + shift * (i == j) for j, x in enumerate(base)])
                if moved[slot] != before[slot]:
                    sources.add(i)
                    follows = follows and moved[slot] == (before[slot] + shift) % 2**64
        if follows and len(sources) == 1:
            found.append((slot, min(sources)))
        else:
            decisive |= sources
    return tuple(found), tuple(sorted(decisive))


def _cubin(text: str) -> bytes:
    """The machine code in the module: a fatbin with one ELF, as a string of MLIR."""
    match = re.search(r'@kernels_binary\("((?:[^"\\]|\\.)*)"', text)
    if match is None:
        raise Untranslatable("the module has no machine code")
    image = _unescaped(match.group(1))
    if image[:4] == _ELF:
        return image
    magic, header = int.from_bytes(image[:4], "little"), int.from_bytes(image[6:8], "little")
    at = header
    while magic == _FATBIN and at < len(image):
        kind = int.from_bytes(image[at : at + 2], "little")
        start = at + int.from_bytes(image[at + 4 : at + 8], "little")
        size = int.from_bytes(image[at + 8 : at + 16], "little")
        if kind == _ELF_KIND and image[start : start + 4] == _ELF:
            return image[start : start + _elf_size(image[start : start + size])]
        at = start + size
    raise Untranslatable("the fatbin has no uncompressed ELF")


def _elf_size(image: bytes) -> int:
    """The end of the last section, segment or table of an ELF; what follows is padding."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(image[at : at + size], "little")

    sections, count = number(0x28, 8), number(0x3C, 2)
    ends = [sections + number(0x3A, 2) * count, number(0x20, 8) + number(0x36, 2) * number(0x38, 2)]
    for i in range(count):
        header = sections + 64 * i
        if number(header + 4, 4) != 8:  # SHT_NOBITS
            ends.append(number(header + 24, 8) + number(header + 32, 8))
    return max(ends)


_ESCAPE = re.compile(rb"\\([0-9A-F]{2}|\\|\")")


def _unescaped(text: str) -> bytes:
    return _ESCAPE.sub(
        lambda m: bytes.fromhex(m.group(1).decode()) if len(m.group(1)) == 2 else m.group(1),
        text.encode("utf-8", "surrogateescape"),
    )
