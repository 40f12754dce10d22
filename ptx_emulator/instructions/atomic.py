"""atom and red on global and shared memory, lane after lane."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..machine.gang import Gang
from ..machine.memory import SHARED_BASE
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .memory import items_of, space_of
from .registry import instruction

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "inc": lambda old, new: old.dtype.type(0) if old >= new else old + old.dtype.type(1),
    "dec": lambda old, new: new if old == 0 or old > new else old - old.dtype.type(1),
}
_TYPES = {"b32": "u32", "b64": "u64"}


@instruction("atom", "red")
def atomic(e: Emitter, ins: Instruction) -> None:
    if ins.has("async") or ins.type not in ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64"):
        raise Unmodelled(e.text)
    operands = list(ins.operands)
    target = operands.pop(0) if ins.opcode == "atom" else None
    operation = next(m for m in ins.mods if m in _OPERATIONS or m == "cas")
    kind = _TYPES.get(ins.type, ins.type)
    space = space_of(ins)
    address = e.address(operands.pop(0), "u32" if space == "shared" else "u64")
    columns = [[e.get(item, kind) for item in items_of(operand)] for operand in operands[:2]]
    values = ", ".join(f"({', '.join(column)},)" for column in columns)
    form = (operation, space, ins.opcode == "atom", ins.has("release", "acq_rel"))
    call = e.call(run, "g", repr(form), address, f"({values},)", e.mask)
    targets = items_of(target)
    if ins.opcode == "red":
        e.line(call)
    else:
        e.put_each(targets, call, kind)


def run(
    g: Gang, form: tuple[Any, ...], address: Any, values: tuple[Any, ...], mask: Any
) -> tuple[Any, ...]:
    """Apply the operation in each active lane; the old values come back."""
    operation, space, reads, releases = form
    active = np.ones(g.lanes, np.bool_) if mask is None else np.broadcast_to(mask, g.lanes)
    where = np.broadcast_to(address, g.lanes)
    columns = [[np.broadcast_to(v, g.lanes) for v in column] for column in values]
    width = len(columns[0])
    dtype = columns[0][0].dtype
    old = np.zeros((width, g.lanes), dtype)
    watch = g.cta.machine.global_watch
    if watch is not None and space != "shared" and active.any():
        places = where[active]
        if not int(places[0]) >> 56:
            watch.synchronise(g.cta, places, (reads, True, releases))
    for lane in np.flatnonzero(active):
        words, at = cell(g, space, where[lane], dtype, width)
        for index in range(width):
            before = words[at + index]
            old[index, lane] = before
            new = columns[0][index][lane]
            if operation == "cas":
                words[at + index] = columns[1][index][lane] if before == new else before
            else:
                words[at + index] = _OPERATIONS[operation](before, new)
            if words[at + index] != old[index, lane]:
                g.cta.machine.memory.stores += 1  # so that it is seen as progress
    return tuple(old)


def cell(g: Gang, space: str, address: Any, dtype: Any, width: int) -> tuple[np.ndarray, int]:
    """An array and an index where the memory cell of an address is."""
    size = dtype.itemsize
    value = int(address)
    if space == "generic" and value >> 56:
        space, value = "shared", value - SHARED_BASE
    if space == "shared":
        cta, offset = g.cta.locate(value)
        cta.smem.gather(np.array([offset]), dtype, width)  # checks
        return cta.smem.bytes.view(dtype), offset // size
    memory = g.cta.machine.memory
    memory.check(np.array([value], np.uint64), size * width, size * width, "an atomic")
    start = value - 4096
    return memory.bytes[start : start + size * width].view(dtype), 0
