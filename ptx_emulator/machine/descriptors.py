"""Shared-memory matrix descriptors of wgmma and tcgen05, and the operands that they describe.

An operand is a matrix of elements of e bytes, `rows` along M or N and 32 bytes along K. In units of
16 bytes, with S the swizzle's span (128, 64 or 32 bytes) and r, k the element's row and K index:

    K-major, swizzled    start + (r / 8) SBO + (r % 8) S + e k
    K-major, plain       start + (r / 8) SBO + (e k / 16) LBO + (r % 8) 16 + e k % 16
    MN-major, swizzled   start + (e r / S) LBO + (k / 8) SBO + (k % 8) S + e r % S
    MN-major, plain      start + (e r / 16) SBO + (k / 8) LBO + (k % 8) 16 + e r % 16

The swizzle then XORs bits 7 to 9 of the absolute address into bits 4 to 6.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ..findings import DescriptorFault, OutOfBounds, Race, UndefinedRead, Unmodelled
from .formats import Format
from .memory import DEFINED, IN_FLIGHT, RESERVED_SMEM, SharedMemory

DEPTH_BYTES = 32  # of one instruction along K


@dataclass(frozen=True)
class MatrixDescriptor:
    """Where an operand lies; all in bytes. `span` is the swizzle's, 0 for none."""

    start: int
    leading: int
    stride: int
    span: int


_SPANS_WGMMA = {0: 0, 1: 128, 2: 64, 3: 32}
_SPANS_TCGEN05 = {0: 0, 2: 128, 4: 64, 6: 32}


@functools.lru_cache(maxsize=4096)
def decode(bits: int, tcgen05: bool) -> MatrixDescriptor:
    """The fields of a 64-bit descriptor.

    Raises:
        DescriptorFault: constant bits have another value, or the swizzle does not exist.
        Unmodelled: a base offset, absolute leading addresses, or a swizzle of 32-byte atoms.
    """
    if bits >> 49 & 7:
        raise Unmodelled(f"matrix descriptor {bits:#018x} with a base offset")
    if tcgen05:
        if bits >> 46 & 7 != 1 or bits >> 53 & 0xFF:
            raise DescriptorFault(f"matrix descriptor {bits:#018x}: bits 46-48 must be 1, 53-60 0")
        if bits >> 52 & 1:
            raise Unmodelled(f"matrix descriptor {bits:#018x} with an absolute leading address")
        kind, spans = bits >> 61 & 7, _SPANS_TCGEN05
        if kind == 1:
            raise Unmodelled(f"matrix descriptor {bits:#018x}: a swizzle of 32-byte atoms")
    else:
        kind, spans = bits >> 62 & 3, _SPANS_WGMMA
    if kind not in spans:
        raise DescriptorFault(f"matrix descriptor {bits:#018x}: there is no swizzle {kind}")
    fields = [(bits >> at & 0x3FFF) << 4 for at in (0, 16, 32)]
    return MatrixDescriptor(fields[0], fields[1], fields[2], spans[kind])


@functools.lru_cache(maxsize=8192)
def units(
    desc: MatrixDescriptor, first: int, rows: int, transposed: bool, item: int = 2, across: int = 2
) -> np.ndarray:
    """Positions of an operand's 16-byte units: (rows, across), or if MN-major (k, rows e / 16)."""
    span, wide = desc.span, desc.span or 16
    if transposed:
        k = np.arange(DEPTH_BYTES // item)[:, None]
        at = item * np.arange(first, first + rows, 16 // item)[None, :]
        along, deep = (desc.leading, desc.stride) if span else (desc.stride, desc.leading)
        address = at // wide * along + k // 8 * deep + k % 8 * wide + at % wide
    else:
        r = np.arange(first, first + rows)[:, None]
        half = np.arange(across)[None, :]
        deep = 16 if span else desc.leading
        address = r // 8 * desc.stride + r % 8 * wide + half * deep
    address = address + desc.start
    if span:
        address = address ^ (address >> 3 & (span - 16))
    return address >> 4


@functools.lru_cache(maxsize=8192)
def words(
    desc: MatrixDescriptor, first: int, rows: int, transposed: bool, item: int = 2
) -> np.ndarray:
    """The 4-byte words of an operand's units."""
    index = units(desc, first, rows, transposed, item).ravel()
    return (index[:, None] * 4 + np.arange(4)).ravel()


def read_units(smem: SharedMemory, index: np.ndarray, what: str) -> np.ndarray:
    """(…, 16) bytes of the 16-byte units `index`, checked as a load is."""
    low, high = int(index.min()) * 16, int(index.max()) * 16
    if low < RESERVED_SMEM or high + 16 > smem.size:
        raise OutOfBounds(
            f"{what} spans shared offsets {low:#x} .. {high + 16:#x}; the CTA has "
            f"{RESERVED_SMEM:#x} .. {smem.size:#x}"
        )
    shadow = smem.shadow.reshape(-1, 16)[index]
    if shadow.min() != DEFINED:
        if (shadow == IN_FLIGHT).any():
            raise Race(f"{what} at shared offset {low:#x} is still being written by a copy")
        if smem.strict:
            raise UndefinedRead(f"{what} at shared offset {low:#x} has bytes that nothing wrote")
    return smem.bytes.reshape(-1, 16)[index]


def operand(
    smem: SharedMemory,
    desc: MatrixDescriptor,
    span: tuple[int, int],
    transposed: bool,
    format: Format,
) -> np.ndarray:
    """Rows `span` = (first, number) of an operand as (number, elements along K) float64."""
    index = units(desc, *span, transposed, format.container)
    values = format.widen(read_units(smem, index, "a matrix operand"))
    if transposed:
        return values.reshape(-1, span[1]).T
    return values.reshape(span[1], -1)
