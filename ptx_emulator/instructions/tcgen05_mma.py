"""tcgen05.mma kind::f16, one CTA or a pair of CTAs.

D, in tensor memory, = A B + D: 16 products and their sum with D in float64, one rounding to fp32,
an instruction after the other. A's rows lie in shared memory (a descriptor) or in tensor memory,
two 16-bit elements a cell; B lies in shared memory, half of its rows in each CTA of a pair.

    cta_group::1, M = 128   row i in lane i
    cta_group::2, M = 256   row i in lane i % 128 of CTA i / 128
    cta_group::2, M = 128   row i in lanes i % 64 and 64 + i % 64 of CTA i / 64: columns up to N / 2
                            in the former, the others in the latter
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..findings import DescriptorFault, TmemFault, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.descriptors import DEPTH, decode, operand, widen
from ..machine.gang import Gang
from ..machine.tmem import Region
from ..ptx.emit import Emitter
from ..ptx.syntax import Address, Instruction, Vector
from .bulk_copy import at_lane, issuing
from .registry import instruction
from .tcgen05 import group_of, tensor_memory

_HINTS = ("collector::a::",)  # which buffer keeps A: no effect that a program can see


@dataclass(frozen=True)
class Form:
    """What an instruction descriptor says."""

    brain: bool
    trans_a: bool
    trans_b: bool
    n: int
    rows: int  # of each CTA
    group: int


def form_of(bits: int, group: int) -> Form:
    """Decode an instruction descriptor of kind::f16.

    Raises:
        DescriptorFault: a shape that the machine does not have, or reserved bits.
        Unmodelled: sparsity, an f16 accumulator, negation, M = 64.
    """
    kinds = (bits >> 7 & 7, bits >> 10 & 7)
    if bits & 0xF or bits >> 4 & 3 != 1 or bits >> 13 & 3 or bits >> 30:
        raise Unmodelled(f"tcgen05.mma with instruction descriptor {bits:#010x}")
    if kinds not in ((0, 0), (1, 1)) or bits >> 6 & 1 or bits >> 23 & 1 or bits >> 29 & 1:
        raise DescriptorFault(f"instruction descriptor {bits:#010x} of kind::f16")
    n, m = (bits >> 17 & 0x3F) << 3, (bits >> 24 & 0x1F) << 4
    if (group, m) not in ((1, 64), (1, 128), (2, 128), (2, 256)):
        raise DescriptorFault(f"tcgen05.mma with M = {m} in cta_group::{group}")
    if not 0 < n <= 256 or n % (16 if m == 128 and group == 1 else 8 if group == 1 else 16):
        raise DescriptorFault(f"tcgen05.mma with M = {m}, N = {n} in cta_group::{group}")
    if m == 64:
        raise Unmodelled("tcgen05.mma with M = 64")
    return Form(kinds[0] == 1, bool(bits >> 15 & 1), bool(bits >> 16 & 1), n, m // group, group)


@instruction("tcgen05.mma")
def mma(e: Emitter, ins: Instruction) -> None:
    extra = [m for m in ins.mods[1:] if m not in ("cta_group::1", "cta_group::2", "kind::f16")]
    if any(not mod.startswith(_HINTS) for mod in extra) or "kind::f16" not in ins.mods:
        raise Unmodelled(e.text)
    if len(ins.operands) != 5 or isinstance(ins.operands[4], Vector):
        raise Unmodelled(e.text)
    d, a, b, descriptor, accumulate = ins.operands
    in_tmem = isinstance(a, Address)
    left = e.address(a, "u32") if in_tmem else e.get(a, "u64")
    names = (e.address(d, "u32"), left, e.get(b, "u64"), e.get(descriptor, "u32"))
    flags = f"{e.get(accumulate, 'b1')}, {in_tmem}, {group_of(ins)}"
    e.line(e.call(issue, "g", f"({', '.join(names)})", f"({flags})", e.mask))


def issue(g: Gang, operands: tuple[Any, ...], flags: tuple[Any, ...], mask: Any) -> None:
    """Start a product for each lane that issues one."""
    add, in_tmem, group = flags
    for lane in issuing(g, mask):
        d, a, b, bits = (at_lane(value, lane) for value in operands)
        form = form_of(bits, group)
        if group == 2 and (g.cta.rank % 2 or len(g.cta.peers) < 2):
            raise TmemFault("tcgen05.mma.cta_group::2 must be issued by the even CTA of a pair")
        ctas = g.cta.peers[g.cta.rank : g.cta.rank + group]
        product = Product(form, ctas, (d, a, b), bool(at_lane(add, lane)), in_tmem)
        memory, warp = tensor_memory(g.cta), int(g.warps[lane // 32])
        before = (memory.pipes[warp],) if warp in memory.pipes else ()
        op = AsyncOp("tcgen05.mma", product.run, before, owner=g.cta)
        product.claim(op)
        memory.pipes[warp] = g.cta.machine.queue.add(op)


class Product:
    """One tcgen05.mma on the CTAs that take part."""

    def __init__(
        self, form: Form, ctas: list[Any], operands: tuple[int, ...], add: bool, in_tmem: bool
    ) -> None:
        self.form, self.ctas, self.add = form, ctas, add
        d, a, b = operands
        if d >> 16 or (in_tmem and a >> 16):
            raise TmemFault(f"tcgen05.mma with D at {d:#x}, A at {a:#x}: lanes must be 0")
        if in_tmem and form.rows != 128:
            raise Unmodelled(f"tcgen05.mma with A in tensor memory and {form.rows} rows a CTA")
        if in_tmem and form.trans_a:
            raise DescriptorFault("tcgen05.mma with a transposed A in tensor memory")
        columns = form.n if form.rows == 128 else form.n // 2
        self.target = Region(d, d + columns)
        self.held = Region(a, a + DEPTH // 2) if in_tmem else None
        self.left = None if in_tmem else decode(a, True)
        self.right = decode(b, True)

    def claim(self, op: AsyncOp) -> None:
        """Check the cells that the product touches, and mark them as in flight."""
        for cta in self.ctas:
            memory = tensor_memory(cta)
            memory.in_pipe(self.target, True, "a tcgen05.mma's D")
            memory.fly(op, self.target, True)
            if self.held is not None:
                memory.in_pipe(self.held, False, "a tcgen05.mma's A")
                memory.fly(op, self.held, False)

    def run(self) -> None:
        form = self.form
        span = (0, form.n // form.group)
        parts = [operand(c.smem, self.right, span, form.trans_b, form.brain) for c in self.ctas]
        b = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for cta in self.ctas:
            data = tensor_memory(cta).data
            total = b @ self.rows_of(cta).T  # (n, rows): tensor memory is kept column by column
            if form.rows == 64:
                total = np.concatenate([total[: form.n // 2], total[form.n // 2 :]], axis=1)
            cells = data[self.target.first : self.target.last].view(np.float32)
            if self.add:
                total += cells
            cells[:] = total

    def rows_of(self, cta: Any) -> np.ndarray:
        """A's rows of a CTA, (rows, 16)."""
        form = self.form
        if self.left is not None:
            return operand(cta.smem, self.left, (0, form.rows), form.trans_a, form.brain)
        assert self.held is not None
        cells = tensor_memory(cta).data[self.held.first : self.held.last]
        halves = np.stack([cells & np.uint32(0xFFFF), cells >> np.uint32(16)], axis=1)
        return widen(halves.astype(np.uint16).reshape(DEPTH, -1), form.brain).T
