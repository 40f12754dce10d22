"""What a cubin says of its kernels: registers, spills, stack, shared memory.

Spills stand nowhere but in the code. They are counted as `ptxas -v` does, by the bytes that the
instructions to local memory (STL, LDL) move: kernels here keep nothing else there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: (symbol, number)
_WITH_SIZE = 4
_RESERVED = 1024  # bytes of .nv.shared that are the driver's
# Instructions of sm_70 and later: 16 bytes, the operation in bits 0 to 11, the type of what a load
# or store moves in bits 73 to 75.
_STL, _LDL = 0x387, 0x983
_BYTES_OF_TYPE = (1, 1, 2, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a thread and a CTA of one kernel take.

    registers: of a thread, at launch.
    spill_stores, spill_loads: bytes that a thread's code moves to and from local memory, each
        instruction counted once.
    stack: bytes of a thread's frame in local memory: where spills go, and what aligns them.
    static_shared: bytes of a CTA; what a launch adds is not in the cubin.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    link: int
    data: bytes
    size: int


def resources(image: bytes) -> dict[str, Resources]:
    """By name, the kernels of a cubin."""
    sections = list(_sections(image))
    by_name = {section.name: section for section in sections}
    symbols = _symbols(by_name[".symtab"], by_name[".strtab"])
    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    for attribute, payload in _attributes(by_name[".nv.info"].data):
        if attribute in (_REGISTERS, _FRAME):
            symbol, number = struct.unpack("<II", payload)
            (registers if attribute == _REGISTERS else frames)[symbols[symbol]] = number
    found = {}
    for name, count in registers.items():
        code = by_name[f".text.{name}"].data
        shared = _shared(by_name.get(f".nv.shared.{name}"))
        moved = _moved(code, _STL), _moved(code, _LDL)
        found[name] = Resources(count, *moved, frames.get(name, 0), shared)
    return found


def as_json(image: bytes) -> dict[str, dict[str, int]]:
    """`resources`, as an index holds them."""
    return {name: asdict(found) for name, found in resources(image).items()}


def _moved(code: bytes, operation: int) -> int:
    """The bytes that all instructions of this operation move."""
    words = struct.iter_unpack("<QQ", code)
    return sum(_BYTES_OF_TYPE[high >> 9 & 7] for low, high in words if low & 0xFFF == operation)


def _shared(section: _Section | None) -> int:
    return 0 if section is None else max(0, section.size - _RESERVED)


def _sections(image: bytes) -> Iterator[_Section]:
    (offset,) = struct.unpack_from("<Q", image, 0x28)
    entry, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, offset + entry * i) for i in range(count)]
    table = headers[names][4]
    for name, kind, _, _, at, size, link, *_ in headers:
        start = table + name
        label = image[start : image.index(b"\0", start)].decode()
        yield _Section(label, link, b"" if kind == 8 else image[at : at + size], size)


def _symbols(section: _Section, strings: _Section) -> list[str]:
    found = []
    for at in range(0, len(section.data), 24):
        (name,) = struct.unpack_from("<I", section.data, at)
        found.append(strings.data[name : strings.data.index(b"\0", name)].decode())
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _WITH_SIZE:
            yield attribute, data[at : at + size]
            at += size
