"""Exchange between the lanes of a warp: shfl, vote, elect, match, redux."""

import functools
from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..machine.gang import Gang
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction, Pair
from .registry import instruction


@instruction("shfl")
def shfl(e: Emitter, ins: Instruction) -> None:
    target, a, b, c = ins.operands[:4]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    mode = next(m for m in ins.mods if m in ("idx", "bfly", "up", "down"))
    value = e.get(a, "u32")
    if isinstance(b, Imm) and isinstance(c, Imm):
        lanes = e.call(fixed_lanes, "g.lanes", repr(mode), str(b.value), str(c.value))
    else:
        lanes = e.call(moving_lanes, "g.lanes", repr(mode), e.get(b, "u32"), e.get(c, "u32"))
    where = e.temp(lanes)
    e.put(first, e.call(exchange, value, f"{where}[0]"), "u32")
    e.put(second, f"{where}[1]", "b1")


@functools.lru_cache(maxsize=4096)
def fixed_lanes(lanes: int, mode: str, b: int, c: int) -> tuple[Any, Any]:
    """Source lane (or one for all, if one warp reads one lane) and whether it is in range."""
    source, valid = moving_lanes(lanes, mode, np.uint32(b & 0xFFFFFFFF), np.uint32(c))
    if lanes == 32 and (source == source[0]).all():
        return int(source[0]), valid
    return source, valid


def moving_lanes(lanes: int, mode: str, b: Any, c: Any) -> tuple[Any, Any]:
    """The PTX manual's pseudo-code, for all lanes at once."""
    lane = np.arange(lanes, dtype=np.int64) & 31
    shift = np.asarray(b).astype(np.int64) & 31
    clamp = np.asarray(c).astype(np.int64) & 31
    segment = (np.asarray(c).astype(np.int64) >> 8) & 31
    highest = (lane & segment) | (clamp & ~segment)
    lowest = lane & segment
    if mode == "up":
        source = lane - shift
        valid = source >= highest
    elif mode == "down":
        source = lane + shift
        valid = source <= highest
    elif mode == "bfly":
        source = lane ^ shift
        valid = source <= highest
    else:
        source = lowest | (shift & ~segment)
        valid = source <= highest
    source = np.where(valid, source, lane)
    return source + (np.arange(lanes) & ~31), valid


def exchange(value: Any, source: Any) -> Any:
    return value[source] if isinstance(value, np.ndarray) and value.ndim else value


def by_warp(gang: Gang, condition: Any, mask: Any) -> np.ndarray:
    """A condition as (warps, 32), False where a lane does not take part."""
    full = np.broadcast_to(condition, gang.lanes)
    if mask is not None:
        full = full & mask
    return full.reshape(-1, 32)


def each_lane(gang: Gang, per_warp: Any) -> Any:
    """One value a warp as one a lane, or as a scalar if there is one warp."""
    return per_warp[0] if len(per_warp) == 1 else np.repeat(per_warp, 32)


@instruction("vote")
def vote(e: Emitter, ins: Instruction) -> None:
    target, condition = ins.operands[:2]
    mode = next(m for m in ins.mods if m in ("ballot", "all", "any", "uni"))
    result = e.call(votes, "g", repr(mode), e.get(condition, "b1"), e.mask)
    e.put(target, result, "u32" if mode == "ballot" else "b1")


def votes(g: Gang, mode: str, condition: Any, mask: Any) -> Any:
    table = by_warp(g, condition, mask)
    if mode == "ballot":
        packed = np.packbits(table, axis=1, bitorder="little").view(np.uint32)[:, 0]
        return each_lane(g, packed)
    if mode == "any":
        return each_lane(g, table.any(axis=1))
    everyone = ~by_warp(g, ~np.asarray(condition), mask)
    if mode == "all":
        return each_lane(g, everyone.all(axis=1))
    return each_lane(g, everyone.all(axis=1) | ~table.any(axis=1))


@instruction("elect")
def elect(e: Emitter, ins: Instruction) -> None:
    target = ins.operands[0]
    assert isinstance(target, Pair)
    if target.first is not None:
        e.put(target.first, e.call(elected_lane, "g", e.mask), "u32")
    e.put(target.second, e.call(elected, "g", e.mask), "b1")


def elected(g: Gang, mask: Any) -> Any:
    """True in the first active lane of each warp."""
    table = by_warp(g, True, mask)
    first = np.zeros((len(g.warps), 32), np.bool_)
    first[np.arange(len(first)), table.argmax(axis=1)] = True
    return first.ravel()


def elected_lane(g: Gang, mask: Any) -> Any:
    return each_lane(g, by_warp(g, True, mask).argmax(axis=1).astype(np.uint32))


@instruction("activemask")
def activemask(e: Emitter, ins: Instruction) -> None:
    e.put(ins.operands[0], e.call(votes, "g", "'ballot'", "True", e.mask), "u32")


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux")
def redux(e: Emitter, ins: Instruction) -> None:
    target, source = ins.operands[:2]
    mode = next(m for m in ins.mods if m in _REDUCE)
    kind = {"s32": "s32", "f32": "f32"}.get(ins.type, "u32")
    if kind == "f32" and ins.has("NaN", "abs"):
        raise Unmodelled(e.text)
    e.put(target, e.call(reduced, "g", repr(mode), e.get(source, kind), e.mask), kind)


def reduced(g: Gang, mode: str, value: Any, mask: Any) -> Any:
    full = np.broadcast_to(value, g.lanes)
    function: Any = _REDUCE[mode]
    if mask is None:
        return each_lane(g, function.reduce(full.reshape(-1, 32), axis=1).astype(full.dtype))
    per_warp = []
    for lanes, taking in zip(full.reshape(-1, 32), by_warp(g, True, mask), strict=True):
        some = lanes[taking]
        per_warp.append(
            function.reduce(some, dtype=full.dtype) if len(some) else full.dtype.type(0)
        )
    return each_lane(g, np.array(per_warp, full.dtype))


@instruction("match")
def match(e: Emitter, ins: Instruction) -> None:
    if not ins.has("any"):
        raise Unmodelled(e.text)
    kind = "u64" if ins.type == "b64" else "u32"
    e.put(ins.operands[0], e.call(matches, "g", e.get(ins.operands[1], kind), e.mask), "u32")


def matches(g: Gang, value: Any, mask: Any) -> Any:
    table = np.broadcast_to(value, g.lanes).reshape(-1, 32)
    equal = (table[:, :, None] == table[:, None, :]) & by_warp(g, True, mask)[:, None, :]
    return np.packbits(equal, axis=2, bitorder="little").view(np.uint32).ravel()
