"""ld, st and prefetch in all state spaces."""

from typing import Any

import numpy as np

from ..check.races import active_warps, warps_of
from ..findings import OutOfBounds, Unmodelled
from ..machine.gang import Gang
from ..machine.memory import DEFINED, LOCAL_BASE, PARAM_BASE, RANK_SHIFT, SHARED_BASE
from ..ptx.emit import Emitter, Value
from ..ptx.syntax import Address, Instruction, Operand, Reg, Symbol, Vector
from .move import raw
from .registry import instruction

Columns = tuple[Any, ...]


def space_of(ins: Instruction) -> str:
    for mod in ins.mods:
        base = mod.split("::")[0]
        if base in ("shared", "global", "local", "param", "const"):
            return base
    return "generic"


def items_of(operand: Operand | None) -> list[Operand | None]:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


@instruction("ld", "ldu")
def ld(e: Emitter, ins: Instruction) -> None:
    target, address = ins.operands[:2]
    items, space = items_of(target), space_of(ins)
    if ins.type == "b128":
        _load_128(e, target, address, space)
        return
    kind = raw(ins.type)
    arguments = [f"D_{kind}", str(len(items))]
    assert isinstance(address, Address)
    if space == "param" and isinstance(address.base, Symbol):
        at = e.program.param_offsets[address.base.name] + address.offset
        loaded = e.call(load_param, "g", str(at), *arguments)
    elif space in ("shared", "local"):
        function = load_shared if space == "shared" else load_local
        loaded = e.call(function, "g", e.address(address, "u32"), *arguments, e.mask)
    else:
        strong = str(ins.has("acquire", "relaxed", "volatile"))
        loaded = e.call(load_generic, "g", e.address(address, "u64"), *arguments, e.mask, strong)
    whole = e.temp(loaded)
    for index, item in enumerate(items):
        value, name = f"{whole}[{index}]", kind
        if kind == "u8":  # extended to the register's width
            name = "s16" if ins.type == "s8" else "u16"
            value = f"{value}.view(D_{ins.type.replace('b', 'u')}).astype(D_{name})"
        if isinstance(item, Reg) and item.type.endswith("32") and name[1:] == "16":
            value, name = f"({value}).astype(D_{name[0]}32)", f"{name[0]}32"
        e.put(item, value, name)


def _load_128(e: Emitter, target: Operand | None, address: Any, space: str) -> None:
    """A 16-byte load into one register, kept as its halves."""
    if space != "shared":
        raise Unmodelled(e.text)
    where = e.address(address, "u32")
    whole = e.temp(e.call(load_shared, "g", where, "D_u64", "2", e.mask))
    value = Value()
    low, high = (Value({"u64": e.temp(f"{whole}[{i}]")}) for i in (0, 1))
    value.pair = (low, high)
    e.put_value(target, value)


@instruction("st")
def st(e: Emitter, ins: Instruction) -> None:
    if ins.has("async", "bulk"):
        raise Unmodelled(e.text)
    address, source = ins.operands[:2]
    kind, space = raw(ins.type), space_of(ins)
    values = []
    for item in items_of(source):
        name = "u16" if kind == "u8" and not (isinstance(item, Reg) and "32" in item.type) else kind
        text = e.get(item, name)
        values.append(f"{text}.astype(D_u8)" if kind == "u8" else text)
    packed = f"({', '.join(values)},)"
    if space in ("shared", "local"):
        function = store_shared if space == "shared" else store_local
        e.line(e.call(function, "g", e.address(address, "u32"), packed, e.mask))
    else:
        strong = str(ins.has("release", "relaxed", "volatile"))
        flags = strong, str(ins.has("release"))
        e.line(e.call(store_generic, "g", e.address(address, "u64"), packed, e.mask, *flags))


@instruction("prefetch", "prefetchu", "discard", "applypriority")
def prefetch(e: Emitter, ins: Instruction) -> None:
    """Has no effect that a program can see."""


# ---- lanes ----
def lanes_of(gang: Gang, mask: Any) -> np.ndarray | None:
    """Indices of the lanes in `mask`; None means all of them."""
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray) or mask.ndim == 0:
        return None if mask else np.zeros(0, np.int64)
    return None if mask.all() else np.flatnonzero(mask)


def chosen(gang: Gang, address: Any, lanes: np.ndarray | None) -> np.ndarray:
    """The addresses of the lanes that take part."""
    if isinstance(address, np.ndarray) and address.ndim:
        return address if lanes is None else address[lanes]
    count = gang.lanes if lanes is None else len(lanes)
    return np.full(min(count, 1), address)


def spread(gang: Gang, table: np.ndarray, address: Any, lanes: np.ndarray | None) -> Columns:
    """(taking part, count) values as `count` registers; zeros in the other lanes."""
    if not (isinstance(address, np.ndarray) and address.ndim):
        if len(table) == 0:
            return tuple(table.dtype.type(0) for _ in range(table.shape[1]))
        return tuple(table[0, i] for i in range(table.shape[1]))
    if lanes is None:
        return tuple(np.ascontiguousarray(table.T))
    full = np.zeros((table.shape[1], gang.lanes), table.dtype)
    full[:, lanes] = table.T
    return tuple(full)


def as_table(gang: Gang, values: Columns, lanes: np.ndarray | None, count: int) -> np.ndarray:
    """Registers as (taking part, number of registers)."""
    dtype = np.asarray(values[0]).dtype
    table = np.empty((count, len(values)), dtype)
    for index, value in enumerate(values):
        whole = isinstance(value, np.ndarray) and value.ndim
        table[:, index] = value[lanes] if whole and lanes is not None else value
    return table


# ---- shared ----
def load_shared(g: Gang, address: Any, dtype: Any, count: int, mask: Any) -> Columns:
    lanes = lanes_of(g, mask)
    where = chosen(g, address, lanes)
    kind = np.dtype(dtype)
    if len(where) == 0:
        return spread(g, np.zeros((0, count), kind), address, lanes)
    offsets = where - g.cta.shared_base
    if len(g.cta.peers) > 1 and (offsets >> np.uint32(RANK_SHIFT)).any():
        table = np.empty((len(where), count), kind)
        for cta, index, inside in by_cta(g, where):
            table[index] = cta.smem.gather(inside, kind, count)
    else:
        table = g.cta.smem.gather(offsets, kind, count)
        if g.cta.race is not None:
            note_read(g, offsets, kind.itemsize * count, lanes)
    return spread(g, table, address, lanes)


def store_shared(g: Gang, address: Any, values: Columns, mask: Any) -> None:
    lanes = lanes_of(g, mask)
    where = chosen(g, address, lanes)
    if len(where) == 0:
        return
    taking_part = lanes
    if not (isinstance(address, np.ndarray) and address.ndim):
        values = tuple(last_lane(value, lanes) for value in values)
        lanes = None
    table = as_table(g, values, lanes, len(where))
    offsets = where - g.cta.shared_base
    if len(g.cta.peers) > 1 and (offsets >> np.uint32(RANK_SHIFT)).any():
        for cta, index, inside in by_cta(g, where):
            cta.smem.scatter(inside, table[index])
    else:
        write_shared(g, offsets, table, taking_part)


def note_read(g: Gang, offsets: np.ndarray, nbytes: int, lanes: np.ndarray | None) -> None:
    """Tell the race checker of one read a lane, or of one for all lanes."""
    assert g.cta.race is not None
    if len(offsets) == (g.lanes if lanes is None else len(lanes)):
        g.cta.race.read(warps_of(g, lanes, len(offsets)), offsets, nbytes)
    else:
        warps = active_warps(g, lanes)
        g.cta.race.read(warps, np.repeat(offsets, len(warps)), nbytes)


def write_shared(g: Gang, offsets: np.ndarray, table: np.ndarray, lanes: np.ndarray | None) -> None:
    """Store (n, count) values; one warp after the other if races are watched."""
    smem, race = g.cta.smem, g.cta.race
    if race is None:
        smem.scatter(offsets, table)
        return
    if len(offsets) == (g.lanes if lanes is None else len(lanes)):
        warps = warps_of(g, lanes, len(offsets))
    else:  # one address for all lanes
        warps = active_warps(g, lanes)
        offsets, table = np.repeat(offsets, len(warps)), np.repeat(table, len(warps), axis=0)
    nbytes = table.dtype.itemsize * table.shape[1]
    smem.check(offsets, nbytes, nbytes, "a store")
    for warp in np.unique(warps):
        mine = warps == warp
        rows, values = offsets[mine], np.ascontiguousarray(table[mine])
        old = smem.bytes.reshape(-1, nbytes)[rows // nbytes]
        unchanged = (old == values.view(np.uint8).reshape(-1, nbytes)).all(axis=1)
        unchanged &= (smem.shadow.reshape(-1, nbytes)[rows // nbytes] == DEFINED).all(axis=1)
        race.write(int(warp), rows, nbytes, unchanged)
        smem.scatter(rows, values)


def last_lane(value: Any, lanes: np.ndarray | None) -> Any:
    """All lanes store to one address: one of them, undefined which, stays."""
    if not (isinstance(value, np.ndarray) and value.ndim):
        return value
    return value[-1] if lanes is None else value[lanes[-1]]


def by_cta(g: Gang, where: np.ndarray) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """Shared addresses by the CTA they name: (CTA, positions, offsets)."""
    ranks = where >> np.uint32(RANK_SHIFT)
    found = []
    for rank in np.unique(ranks):
        index = np.flatnonzero(ranks == rank)
        cta, _ = g.cta.locate(int(rank) << RANK_SHIFT)
        found.append((cta, index, where[index] & np.uint32((1 << RANK_SHIFT) - 1)))
    return found


# ---- global and generic ----
def load_generic(
    g: Gang, address: Any, dtype: Any, count: int, mask: Any, strong: bool = False
) -> Columns:
    """A load; `strong`: one by which CTAs learn of each other."""
    lanes = lanes_of(g, mask)
    where = chosen(g, address, lanes)
    kind = np.dtype(dtype)
    if len(where) == 0:
        return spread(g, np.zeros((0, count), kind), address, lanes)
    window = int(where[0]) >> 56
    if window == 0:
        table = g.cta.machine.memory.gather(where, kind, count)
        if g.cta.machine.global_watch is not None:
            note_global(g.cta, where, kind.itemsize * count, strong)
        return spread(g, table, address, lanes)
    if window == SHARED_BASE >> 56:
        return load_shared(
            g, (address - np.uint64(SHARED_BASE)).astype(np.uint32), dtype, count, mask
        )
    if window == PARAM_BASE >> 56:
        offsets = (where - np.uint64(PARAM_BASE)).astype(np.int64)
        params = g.cta.machine.params
        rows = offsets[:, None] + np.arange(kind.itemsize * count)
        if rows.max() >= len(params):
            raise OutOfBounds(f"a load at offset {int(offsets.max()):#x} of the parameters")
        return spread(g, params[rows].view(kind), address, lanes)
    return load_local(g, (address - np.uint64(LOCAL_BASE)).astype(np.uint32), dtype, count, mask)


def store_generic(
    g: Gang, address: Any, values: Columns, mask: Any, strong: bool = False, release: bool = False
) -> None:
    lanes = lanes_of(g, mask)
    where = chosen(g, address, lanes)
    if len(where) == 0:
        return
    window = int(where[0]) >> 56
    if window == SHARED_BASE >> 56:
        store_shared(g, (address - np.uint64(SHARED_BASE)).astype(np.uint32), values, mask)
    elif window == LOCAL_BASE >> 56:
        store_local(g, (address - np.uint64(LOCAL_BASE)).astype(np.uint32), values, mask)
    elif window:
        raise OutOfBounds(f"a store to generic address {int(where[0]):#x}")
    else:
        if not (isinstance(address, np.ndarray) and address.ndim):
            values = tuple(last_lane(value, lanes) for value in values)
            lanes = None
        table = as_table(g, values, lanes, len(where))
        if g.cta.machine.global_watch is not None:
            note_global_store(g.cta, where, table, (strong, release))
        g.cta.machine.memory.scatter(where, table)


def note_global(cta: Any, where: np.ndarray, nbytes: int, strong: bool) -> None:
    """Tell who watches global memory of a load."""
    watch = cta.machine.global_watch
    if strong:
        watch.synchronise(cta, where, (True, False, False))
    else:
        watch.lanes(cta, where, nbytes)


def note_global_store(cta: Any, where: np.ndarray, table: np.ndarray, how: Any) -> None:
    """Tell who watches global memory of a store, which is (strong, a release)."""
    strong, release = how
    watch, memory = cta.machine.global_watch, cta.machine.memory
    if strong:
        watch.synchronise(cta, where, (False, True, release))
        return
    nbytes = table.dtype.itemsize * table.shape[1]
    memory.check(where, nbytes, nbytes, "a store")
    old = memory.gather(where, table.dtype, table.shape[1])
    same = (old.view(np.uint8) == np.ascontiguousarray(table).view(np.uint8)).all(axis=1)
    watch.lanes(cta, where, nbytes, ~same)


# ---- local and parameters ----
def load_local(g: Gang, address: Any, dtype: Any, count: int, mask: Any) -> Columns:
    rows, columns = local_index(g, address, np.dtype(dtype).itemsize * count)
    table = g.cta.local[rows, columns].view(dtype)
    return tuple(np.ascontiguousarray(table.T))


def store_local(g: Gang, address: Any, values: Columns, mask: Any) -> None:
    lanes = lanes_of(g, mask)
    nbytes = sum(np.asarray(value).itemsize for value in values)
    rows, columns = local_index(g, address, nbytes)
    table = as_table(g, values, None, g.lanes).view(np.uint8)
    if lanes is not None:
        rows, columns, table = rows[lanes], columns[lanes], table[lanes]
    g.cta.local[rows, columns] = table


def local_index(g: Gang, address: Any, nbytes: int) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.broadcast_to(address, g.lanes).astype(np.int64)
    columns = offsets[:, None] + np.arange(nbytes)
    if columns.max() >= g.cta.local.shape[1]:
        raise OutOfBounds(f"local offset {int(offsets.max()):#x}")
    rows = (g.warps[:, None] * 32 + np.arange(32)).ravel()[:, None]
    return np.broadcast_to(rows, columns.shape), columns


def load_param(g: Gang, at: int, dtype: Any, count: int) -> Columns:
    kind = np.dtype(dtype)
    return tuple(np.frombuffer(g.cta.machine.params, kind, count, at))
