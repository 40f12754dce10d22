"""Tiled TMA: boxes of a tensor map in global memory, and where they lie in shared memory."""

import functools

import numpy as np

from ..findings import DescriptorFault, Misaligned, OutOfBounds, Unmodelled
from ..launch.tensormap import SWIZZLE_MASK, TILED, TensorMap
from .memory import DEFINED, RESERVED_SMEM, GlobalMemory, SharedMemory, _WholeMemory

NAN_FILL = 0x7FF7  # what an H200 fills bf16 with


def check_map(tensor: TensorMap, coords: tuple[int, ...]) -> None:
    """Raise unless the machine can use this map with these coordinates."""
    if tensor.kind not in TILED or tensor.interleave or tensor.bits % 8:
        raise Unmodelled(f"a tensor map of kind {tensor.kind}, element {tensor.element}")
    if tensor.swizzle_atom:
        raise Unmodelled(f"a tensor map with swizzle atom {tensor.swizzle_atom}")
    if len(coords) != tensor.rank:
        raise DescriptorFault(f"{len(coords)} coordinates for a tensor map of rank {tensor.rank}")
    if tensor.address % 16 or any(stride % 16 for stride in tensor.strides[1:]):
        raise DescriptorFault("a tensor map's address or stride is no multiple of 16 bytes")
    inner = tensor.box[0] * tensor.item
    if inner % 16:
        raise DescriptorFault(f"a box row of {inner} bytes is no multiple of 16")
    if tensor.swizzle and inner > 16 << tensor.swizzle:
        raise DescriptorFault(f"a box row of {inner} bytes is wider than the swizzle")
    if any(step != 1 for step in tensor.element_strides):
        raise Unmodelled("a tensor map with element strides")


def check_destination(smem: SharedMemory, offset: int, nbytes: int) -> None:
    if offset % 128:
        raise Misaligned(f"a TMA box at shared offset {offset:#x} is not aligned to 128 bytes")
    if not RESERVED_SMEM <= offset <= smem.size - nbytes:
        raise OutOfBounds(f"a TMA box of {nbytes} bytes at shared offset {offset:#x}")


def _clip(tensor: TensorMap, coords: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each dimension the part of the box, [low, high), that is inside of the tensor."""
    parts = []
    for at, extent, size in zip(coords, tensor.box, tensor.dims, strict=True):
        low = min(max(-at, 0), extent)
        parts.append((low, max(min(size - at, extent), low)))
    return parts


Extent = tuple[int, tuple[int, ...], tuple[int, ...]]


def extent(tensor: TensorMap, coords: tuple[int, ...]) -> Extent | None:
    """The part of a box inside of the tensor: first address, shape, strides; None if empty.

    Its shape is (dims from the outermost to 1, bytes of dimension 0).
    """
    parts = _clip(tensor, coords)
    if any(low == high for low, high in parts):
        return None
    start = tensor.address
    for at, stride, (low, _) in zip(coords, tensor.strides, parts, strict=True):
        start += (at + low) * stride
    shape = [high - low for low, high in parts]
    shape[0] *= tensor.item
    return start, tuple(shape[::-1]), (1, *tensor.strides[1:])[::-1]


def _view(memory: GlobalMemory, tensor: TensorMap, coords: tuple[int, ...]) -> np.ndarray | None:
    """That part as an array over global memory."""
    found = extent(tensor, coords)
    if found is None:
        return None
    start, shape, strides = found
    last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory.check(np.array([start, last], np.uint64), 1, 1, "TMA access")
    flat = memory.bytes[start - _WholeMemory.BASE :]
    return np.lib.stride_tricks.as_strided(flat, shape, strides)


def _inside(tensor: TensorMap, coords: tuple[int, ...]) -> tuple[slice, ...]:
    parts = _clip(tensor, coords)
    slices = [slice(low, high) for low, high in parts]
    slices[0] = slice(parts[0][0] * tensor.item, parts[0][1] * tensor.item)
    return tuple(slices[::-1])


def box_shape(tensor: TensorMap) -> tuple[int, ...]:
    """Box extents, the outermost first, dimension 0 in bytes."""
    return (*tensor.box[:0:-1], tensor.box[0] * tensor.item)


def read_box(memory: GlobalMemory, tensor: TensorMap, coords: tuple[int, ...]) -> np.ndarray:
    """A box from global memory; outside of the tensor zeros, or NaN if the map says so."""
    box = np.zeros(box_shape(tensor), np.uint8)
    if tensor.nan_fill:
        if tensor.item != 2:
            raise Unmodelled(f"out-of-bounds fill with NaN of {tensor.element}")
        box.view(np.uint16)[...] = NAN_FILL
    part = _view(memory, tensor, coords)
    if part is not None:
        box[_inside(tensor, coords)] = part
    return box


def write_box(
    memory: GlobalMemory, tensor: TensorMap, coords: tuple[int, ...], box: np.ndarray
) -> None:
    """Store a box; what lies outside of the tensor is dropped."""
    part = _view(memory, tensor, coords)
    if part is not None:
        part[...] = box.reshape(box_shape(tensor))[_inside(tensor, coords)]


@functools.lru_cache(maxsize=256)
def swizzled_units(start: int, shape: tuple[int, int], pitch: int, swizzle: int) -> np.ndarray:
    """Positions in 16-byte units of (rows, units in a row) from unit `start`, one after another."""
    unit = start + np.arange(shape[0])[:, None] * pitch + np.arange(shape[1])
    return (unit ^ ((unit >> 3) & SWIZZLE_MASK[swizzle])).ravel()


def units_of(tensor: TensorMap, offset: int) -> np.ndarray:
    """Where the 16-byte units of a box lie that is at a shared offset."""
    inner = tensor.box[0] * tensor.item // 16
    shape = tensor.box_bytes // 16 // inner, inner
    return swizzled_units(offset // 16, shape, tensor.row_pitch // 16, tensor.swizzle)


def put_box(smem: SharedMemory, tensor: TensorMap, offset: int, box: np.ndarray) -> None:
    """Write a box to shared memory in the map's swizzle."""
    units = units_of(tensor, offset)
    smem.bytes.reshape(-1, 16)[units] = box.reshape(-1, 16)
    smem.shadow.reshape(-1, 16)[units] = DEFINED


def take_box(smem: SharedMemory, tensor: TensorMap, offset: int) -> np.ndarray:
    """Read a box from shared memory."""
    return smem.bytes.reshape(-1, 16)[units_of(tensor, offset)].reshape(box_shape(tensor))
