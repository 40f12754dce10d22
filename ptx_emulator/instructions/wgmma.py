"""wgmma: products of a warpgroup whose B, and perhaps A, lie in shared memory.

mma_async returns registers that get their values when the product is done, which is when a
wait_group demands it or the schedule says so; until then they read as NaN. Shared memory is read
when the product is done, so a slot that is refilled too early shows. Arithmetic as for mma.sync: 16
products and their sum with C in float64, one rounding to fp32.
"""

import re
from typing import Any

import numpy as np

from ..findings import DescriptorFault, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.descriptors import decode, operand
from ..machine.gang import Gang
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction, Vector
from .matrix_load import warps_of
from .memory import items_of
from .mma_sync import fragment_a
from .registry import instruction

_SHAPE = re.compile(r"m64n(\d+)k16")


@instruction("wgmma.fence")
def fence(e: Emitter, ins: Instruction) -> None:
    """Orders registers and products; a product takes its registers at its issue here."""


@instruction("wgmma.mma_async.sync.aligned")
def mma_async(e: Emitter, ins: Instruction) -> None:
    shape = _SHAPE.fullmatch(ins.mods[3])
    kinds = ins.mods[4:]
    if shape is None or kinds not in (("f32", "f16", "f16"), ("f32", "bf16", "bf16")):
        raise Unmodelled(e.text)
    if ins.guard is not None:
        raise Unmodelled(e.text)
    d, a, b, scale, *flags = ins.operands
    values = [flag.value if isinstance(flag, Imm) else None for flag in flags]
    if values[:2] != [1, 1]:
        raise Unmodelled(e.text)
    in_registers = isinstance(a, Vector)
    trans = [bool(value) for value in values[2:]]
    trans_a, trans_b = (False, *trans) if in_registers else trans
    brain = kinds[1] == "bf16"
    if in_registers:
        names = [e.get(item, "u32") for item in items_of(a)]
        left = e.temp(e.call(fragment_a, "g", str(brain), *names))
    else:
        left = e.get(a, "u64")
    old = ", ".join(e.get(item, "f32") for item in items_of(d))
    form = (int(shape.group(1)), brain, trans_a, trans_b)
    arguments = (left, e.get(b, "u64"), e.get(scale, "b1"), f"({old},)", repr(form), e.mask)
    e.put_each(items_of(d), e.call(issue, "g", *arguments), "f32")


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
    n, brain, trans_a, trans_b = form
    warps_of(g, mask)
    result = np.full((n // 2, g.lanes), np.nan, np.float32)
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
            parts = [operand(smem, d, r, trans_a, brain) for d, r in zip(left, rows, strict=True)]
            first = np.stack(parts)
        seconds = {d: operand(smem, d, (0, n), trans_b, brain).T for d in set(right)}
        if len(seconds) == 1:
            total = np.matmul(first, seconds[right[0]])
        else:
            total = np.matmul(first, np.stack([seconds[d] for d in right]))
        if accumulate.any():
            total += np.where(accumulate[:, None, None], gather(old, count), 0.0)
        table = total.astype(np.float32).reshape(-1, 2, 8, n // 8, 4, 2)
        result[:] = table.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)

    # a product reads the registers of the one before it, so they finish in order
    before = tuple(g.products[-1:])
    op = g.cta.machine.queue.add(AsyncOp("wgmma", run, before, owner=g.cta))
    g.products.append(op)
    if mask is not None:  # registers of a divergent region are copied at its end
        g.cta.machine.queue.finish([op])
    return result


def gather(registers: tuple[Any, ...], warps: int) -> np.ndarray:
    """(warps, 16, n) from accumulator registers: the inverse of what `issue` returns."""
    table = np.empty((len(registers), 32 * warps), np.float32)
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
    g.products = [op for op in g.products if not op.done]
