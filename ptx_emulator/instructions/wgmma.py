"""wgmma: products of a warpgroup whose B, and perhaps A, lie in shared memory.

mma_async returns registers that get their values when the product is done, which is when a
wait_group demands it or the schedule says so; until then they read as NaN. Shared memory is read
when the product is done, so a slot that is refilled too early shows. Arithmetic as for mma.sync:
32 bytes of K and the sum with C in float64, one rounding to fp32.
"""

import re
from typing import Any

import numpy as np

from ..check.races import WORD, Copy
from ..findings import DescriptorFault, Race, Unmodelled
from ..machine import sums
from ..machine.async_ops import AsyncOp
from ..machine.descriptors import decode, operand, words
from ..machine.formats import FORMATS
from ..machine.gang import Gang
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction, Vector
from .matrix_load import warps_of
from .memory import items_of
from .mma_sync import fragment_a
from .registry import instruction

_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
_EIGHT = ("e4m3", "e5m2")


@instruction("wgmma.fence")
def fence(e: Emitter, ins: Instruction) -> None:
    """Products take their registers at once; check/wgmma_fence.py finds a missing fence."""


@instruction("wgmma.mma_async.sync.aligned")
def mma_async(e: Emitter, ins: Instruction) -> None:
    shape = _SHAPE.fullmatch(ins.mods[3])
    kinds = ins.mods[4:]
    if shape is None or len(kinds) != 3 or ins.guard is not None:
        raise Unmodelled(e.text)
    n, depth = int(shape.group(1)), int(shape.group(2))
    kind = "s32" if kinds[1] in ("s8", "u8") else "f32"
    same = kinds[1] == kinds[2] or (kinds[1] in _EIGHT and kinds[2] in _EIGHT)
    if kinds[0] != kind or not same or _DEPTH.get(kinds[1]) != depth:
        raise Unmodelled(e.text)
    d, a, b, scale, *flags = ins.operands
    values = [flag.value if isinstance(flag, Imm) else None for flag in flags]
    if values[:2] not in ([1, 1], []):
        raise Unmodelled(e.text)
    if ins.line in e.program.unfenced:
        e.line(e.call(report_unfenced, "g", repr(e.program.unfenced[ins.line])))
    in_registers = isinstance(a, Vector)
    trans = [bool(value) for value in values[2:]] or ([False] if in_registers else [False, False])
    trans_a, trans_b = (False, *trans) if in_registers else trans
    if in_registers:
        names = [e.get(item, "u32") for item in items_of(a)]
        left = e.temp(e.call(fragment_a, "g", repr(kinds[1]), *names))
    else:
        left = e.get(a, "u64")
    old = ", ".join(e.get(item, kind) for item in items_of(d))
    form = (n, kinds[1:], trans_a, trans_b)
    arguments = (left, e.get(b, "u64"), e.get(scale, "b1"), f"({old},)", repr(form), e.mask)
    e.put_each(items_of(d), e.call(issue, "g", *arguments), kind)


def report_unfenced(g: Gang, register: str) -> None:
    g.cta.machine.findings.report(
        Race(f"a wgmma uses {register}, which was written since the last wgmma.fence")
    )


def per_warp(g: Gang, value: Any) -> list[int]:
    """A descriptor or a flag, which all lanes of a warp share, of each warp."""
    if not (isinstance(value, np.ndarray) and value.ndim):
        return [int(value)] * len(g.warps)
    table = value.reshape(-1, 32)
    if (table != table[:, :1]).any():
        raise DescriptorFault("a wgmma's descriptor or scale-d differs between lanes of a warp")
    return [int(x) for x in table[:, 0]]


def issue(
    g: Gang, a: Any, b: Any, scale: Any, old: tuple[Any, ...], form: Any, mask: Any
) -> np.ndarray:
    """Start D = A B + scale D; returns D's registers, (registers, lanes), filled when done."""
    n, kinds, trans_a, trans_b = form
    first_format, second_format = (FORMATS[kind] for kind in kinds)
    warps_of(g, mask)
    integer = not first_format.exponent
    dtype: Any = np.int32 if integer else np.float32
    result = np.full((n // 2, g.lanes), -1 if integer else np.nan, dtype)
    smem, warps, count = g.cta.smem, g.warps, len(g.warps)
    in_registers = isinstance(a, np.ndarray) and a.ndim == 3
    left = None if in_registers else [decode(bits, False) for bits in per_warp(g, a)]
    right = [decode(bits, False) for bits in per_warp(g, b)]
    accumulate = np.array(per_warp(g, scale), np.bool_)

    def run() -> None:
        if left is None:
            first = a
        else:
            rows = [(16 * int(warp % 4), 16) for warp in warps]
            parts = [
                operand(smem, d, r, trans_a, first_format) for d, r in zip(left, rows, strict=True)
            ]
            first = np.stack(parts)
        seconds = {d: operand(smem, d, (0, n), trans_b, second_format).T for d in set(right)}
        second = seconds[right[0]] if len(seconds) == 1 else np.stack([seconds[d] for d in right])
        added: Any = 0.0
        if accumulate.any():
            added = np.where(accumulate[:, None, None], gather(old, count), 0.0)
        if g.cta.machine.hardware_sums and kinds[0] in sums.KNOWN:
            start = np.broadcast_to(added, (*first.shape[:-1], n))
            total = sums.step(first, second, start, first_format.smallest)
        else:
            total = np.matmul(first, second) + added
        table = total.astype(dtype).reshape(-1, 2, 8, n // 8, 4, 2)
        result[:] = table.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)

    # a product reads the registers of the one before it, so they finish in order
    before = tuple(g.products[-1:])
    op = g.cta.machine.queue.add(AsyncOp("wgmma", run, before, owner=g.cta))
    g.products.append(op)
    if g.cta.race is not None:
        op.mark = note_operands(g, (left, right), form)
    if mask is not None:  # registers of a divergent region are copied at its end
        g.settle()
    return result


def note_operands(g: Gang, operands: tuple[Any, Any], form: Any) -> list[Copy]:
    """Tell the race checker what each warp's part of a product reads: 16 rows of A, and B."""
    left, right = operands
    n, kinds, trans_a, trans_b = form
    assert g.cta.race is not None
    found = []
    for index, warp in enumerate(g.warps):
        parts = [words(right[index], 0, n, trans_b, FORMATS[kinds[1]].container)]
        if left is not None:
            first = 16 * int(warp % 4)
            parts.append(words(left[index], first, 16, trans_a, FORMATS[kinds[0]].container))
        for part in parts:
            g.cta.smem.check(WORD * part, WORD, WORD, "an operand of a wgmma")
        found += [g.cta.race.issue_product(int(warp), part, "a wgmma") for part in parts]
    return found


def gather(registers: tuple[Any, ...], warps: int) -> np.ndarray:
    """(warps, 16, n) from accumulator registers: the inverse of what `issue` returns."""
    table = np.empty((len(registers), 32 * warps), np.asarray(registers[0]).dtype)
    for index, value in enumerate(registers):
        table[index] = value
    parts = table.reshape(-1, 2, 2, warps, 8, 4)  # 8 columns, row half, column, warp, row, pair
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(warps, 16, -1)


@instruction("wgmma.commit_group")
def commit_group(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_commit, "g"))


def run_commit(g: Gang) -> None:
    """A group ends with the newest product: groups are kept as the product each ends with."""
    g.product_groups.append(g.products[-1:])


@instruction("wgmma.wait_group")
def wait_group(e: Emitter, ins: Instruction) -> None:
    count = ins.operands[0]
    assert isinstance(count, Imm)
    e.line(e.call(run_wait, "g", str(count.value)))


def run_wait(g: Gang, keep: int) -> None:
    finished = g.product_groups[: len(g.product_groups) - keep]
    g.product_groups = g.product_groups[len(finished) :]
    for group in finished:
        g.cta.machine.queue.finish(group)
    over = [op for op in g.products if op.done]
    g.end_products(over)
    g.products = [op for op in g.products if not op.done]
