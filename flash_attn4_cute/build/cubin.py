"""What a cubin says of its kernels: registers, stack, shared memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: (symbol, number)
_WITH_SIZE = 4
_RESERVED = 1024  # bytes of .nv.shared that are the driver's


@dataclass(frozen=True, slots=True)
class Resources:
    """What a thread and a CTA of one kernel take; `stack` bytes hold what ptxas spilled."""

    registers: int
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
    return {
        name: Resources(count, frames.get(name, 0), _shared(by_name.get(f".nv.shared.{name}")))
        for name, count in registers.items()
    }


def as_json(image: bytes) -> dict[str, dict[str, int]]:
    """`resources`, as an index holds them."""
    return {name: asdict(found) for name, found in resources(image).items()}


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
