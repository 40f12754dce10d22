"""ldmatrix, stmatrix and movmatrix: 8x8 tiles of 16-bit elements between shared memory and lanes.

Lanes 8i .. 8i+7 give the row addresses of tile i; lane 4r + c gets elements 2c and 2c+1 of row r.
"""

from typing import Any

import numpy as np

from ..findings import Unmodelled
from ..machine.gang import Gang
from ..machine.memory import RANK_SHIFT
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .memory import by_cta, items_of, write_shared
from .registry import instruction

_COUNT = {"x1": 1, "x2": 2, "x4": 4}


@instruction("ldmatrix")
def ldmatrix(e: Emitter, ins: Instruction) -> None:
    if not ins.has("m8n8") or ins.type != "b16":
        raise Unmodelled(e.text)
    items = items_of(ins.operands[0])
    function = load_tiles_transposed if ins.has("trans") else load_tiles
    address = e.address(ins.operands[1], "u32")
    e.put_each(items, e.call(function, "g", address, str(len(items)), e.mask), "u32")


@instruction("stmatrix")
def stmatrix(e: Emitter, ins: Instruction) -> None:
    if not ins.has("m8n8") or ins.type != "b16":
        raise Unmodelled(e.text)
    values = ", ".join(e.get(item, "u32") for item in items_of(ins.operands[1]))
    address = e.address(ins.operands[0], "u32")
    trans = str(ins.has("trans"))
    e.line(e.call(store_tiles, "g", address, f"({values},)", trans, e.mask))


def row_addresses(g: Gang, address: Any, count: int, mask: Any) -> np.ndarray:
    """(warps that take part, tiles, 8) shared addresses."""
    table = np.broadcast_to(address, g.lanes).reshape(-1, 32)
    warps = warps_of(g, mask)
    if warps is not None:
        table = table[warps]
    return np.ascontiguousarray(table[:, : 8 * count]).reshape(-1, count, 8)


def warps_of(g: Gang, mask: Any) -> np.ndarray | None:
    """Positions of the warps whose lanes are all in `mask`; None if all are.

    Raises:
        Unmodelled: some lanes of a warp are, others are not, which PTX leaves undefined.
    """
    if mask is None or (not isinstance(mask, np.ndarray) and mask):
        return None
    table = np.broadcast_to(mask, g.lanes).reshape(-1, 32)
    whole = table.all(axis=1)
    if (table.any(axis=1) & ~whole).any():
        raise Unmodelled("an .aligned instruction is executed by a part of a warp")
    return None if whole.all() else np.flatnonzero(whole)


def gather_rows(g: Gang, address: Any, count: int, mask: Any) -> np.ndarray:
    """(warps, tiles, 8 rows, 4 words)."""
    rows = row_addresses(g, address, count, mask)
    offsets = (rows - g.cta.shared_base).ravel()
    words = g.cta.smem.gather(offsets, np.dtype(np.uint32), 4)
    if g.cta.race is not None:
        g.cta.race.read(_owners(g, offsets, mask), offsets, 16)
    return words.reshape(-1, count, 8, 4)


def per_register(g: Gang, table: np.ndarray, mask: Any) -> tuple[np.ndarray, ...]:
    """(warps, tiles, 32) words as one register a tile."""
    warps = warps_of(g, mask)
    if warps is not None:
        full = np.zeros((len(g.warps), *table.shape[1:]), np.uint32)
        full[warps] = table
        table = full
    return tuple(np.ascontiguousarray(table.transpose(1, 0, 2)).reshape(table.shape[1], -1))


def load_tiles(g: Gang, address: Any, count: int, mask: Any) -> tuple[np.ndarray, ...]:
    words = gather_rows(g, address, count, mask)
    return per_register(g, words.reshape(-1, count, 32), mask)


def load_tiles_transposed(g: Gang, address: Any, count: int, mask: Any) -> tuple[np.ndarray, ...]:
    halves = gather_rows(g, address, count, mask).view(np.uint16)  # (warps, tiles, row, column)
    turned = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
    return per_register(g, turned.reshape(-1, count, 32), mask)


def store_tiles(g: Gang, address: Any, values: tuple[Any, ...], trans: bool, mask: Any) -> None:
    count = len(values)
    rows = row_addresses(g, address, count, mask).ravel()
    table: np.ndarray = np.stack([np.broadcast_to(v, g.lanes) for v in values]).reshape(
        count, -1, 32
    )
    table = np.ascontiguousarray(table.transpose(1, 0, 2)).reshape(-1, count, 8, 4)
    warps = warps_of(g, mask)
    if warps is not None:
        table = table[warps]
    if trans:
        halves = np.ascontiguousarray(table).view(np.uint16)
        table = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
    words = np.ascontiguousarray(table).reshape(-1, 4)
    own = not ((rows - g.cta.shared_base) >> np.uint32(RANK_SHIFT)).any()
    if own and g.cta.race is not None:
        lanes = np.searchsorted(g.warps, _owners(g, rows, mask)) * 32
        write_shared(g, rows - g.cta.shared_base, words, lanes)
        return
    for cta, index, offsets in by_cta(g, rows):
        cta.smem.scatter(offsets, words[index])


def _owners(g: Gang, rows: np.ndarray, mask: Any) -> np.ndarray:
    """The warp of each row address."""
    warps = warps_of(g, mask)
    taking_part = g.warps if warps is None else g.warps[warps]
    return np.repeat(taking_part, len(rows) // max(1, len(taking_part)))


@instruction("movmatrix")
def movmatrix(e: Emitter, ins: Instruction) -> None:
    value = e.get(ins.operands[1], "u32")
    e.put(ins.operands[0], e.call(transpose_tile, "g", value), "u32")


def transpose_tile(g: Gang, value: Any) -> np.ndarray:
    words = np.ascontiguousarray(np.broadcast_to(value, g.lanes)).reshape(-1, 8, 4)
    turned = np.ascontiguousarray(words.view(np.uint16).swapaxes(1, 2))
    return turned.view(np.uint32).ravel()
