"""tcgen05.mma of one CTA or a pair of CTAs: kinds f16, tf32, f8f6f4 and i8, and their .ws forms.

D, in tensor memory, = A B + D: the products of one instruction (32 bytes of K) and their sum with D
in float64, one rounding to fp32, an instruction after the other. A's rows lie in shared memory (a
descriptor) or in tensor memory, 32 bits a cell; B lies in shared memory, half of its rows in each
CTA of a pair. Row i of D, with the letters of the PTX manual's data path layouts:

    cta_group::1, M = 128      (D) lane i
    cta_group::1, M = 64       (F) lane 32 (i / 16) + i % 16, or 16 further if D's address says so
    cta_group::2, M = 256      (A) lane i % 128 of CTA i / 128
    cta_group::2, M = 128      (B) lanes i % 64 and 64 + i % 64 of CTA i / 64: columns up to N / 2
                                   in the former, the others in the latter
    .ws, M = 64                (E) the same in one CTA
    .ws, M = 32                (G) lanes i, 32 + i, 64 + i, 96 + i, a quarter of the columns each

A in tensor memory is read from the lanes that its rows' results go to, so B, E and G need copies.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..check.races import WORD
from ..check.tmem_fences import FenceWatch, fences_of
from ..check.tmem_races import PIPE
from ..findings import DescriptorFault, TmemFault, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.descriptors import decode, operand, words
from ..machine.formats import FORMATS, Format
from ..machine.gang import Gang
from ..machine.tmem import LANES, Region
from ..ptx.emit import Emitter
from ..ptx.syntax import Address, Imm, Instruction, Vector
from .bulk_copy import at_lane, issuing
from .registry import instruction
from .tcgen05 import group_of, tensor_memory

CELLS = 8  # of a lane: what one instruction reads of A along K
_INPUTS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"},
    "i8": {0: "u8", 1: "s8"},
}
_SHAPES = ((1, 64), (1, 128), (2, 128), (2, 256))


@dataclass(frozen=True)
class Form:
    """What an instruction descriptor says. `parts`: groups of lanes that D's columns go to."""

    a: Format
    b: Format
    negated: bool
    trans_a: bool
    trans_b: bool
    n: int
    rows: int  # of each CTA
    group: int
    parts: int
    spread: bool  # 16 rows in every 32 lanes


@dataclass(frozen=True)
class Variant:
    """What an instruction's text says."""

    kind: str
    group: int
    ws: bool
    in_tmem: bool
    scale: int  # D is divided by 2^scale before


def form_of(bits: int, variant: Variant) -> Form:
    """Decode an instruction descriptor.

    Raises:
        DescriptorFault: a shape or a format that the machine does not have, or reserved bits.
        Unmodelled: sparsity, saturation, an f16 accumulator.
    """
    kind, group = variant.kind, variant.group
    formats = _INPUTS[kind]
    codes = (bits >> 7 & 7, bits >> 10 & 7)
    if bits & 0xF or bits >> 4 & 3 != (2 if kind == "i8" else 1) or bits >> 30:
        raise Unmodelled(f"tcgen05.mma with instruction descriptor {bits:#010x}")
    if any(code not in formats for code in codes) or bits >> 23 & 1 or bits >> 29 & 1:
        raise DescriptorFault(f"instruction descriptor {bits:#010x} of kind::{kind}")
    if kind == "f16" and codes[0] != codes[1]:
        raise DescriptorFault(f"instruction descriptor {bits:#010x} mixes f16 and bf16")
    a, b = (FORMATS[formats[code]] for code in codes)
    trans_a, trans_b = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
    if (trans_a and a.bits != 8 * a.container) or (trans_b and b.bits != 8 * b.container):
        raise DescriptorFault(f"a transposed operand of {a.name} or {b.name}")
    if (trans_a and a.bits == 32) or (trans_b and b.bits == 32):
        raise Unmodelled("a transposed operand of tf32, which swizzles 32-byte atoms")
    n, m = (bits >> 17 & 0x3F) << 3, (bits >> 24 & 0x1F) << 4
    _check_shape(m, n, variant)
    split = {32: 4, 64: 2}.get(m, 1) if variant.ws else 2 if (group, m) == (2, 128) else 1
    return Form(
        a=a,
        b=b,
        negated=bool(bits >> 13 & 1) != bool(bits >> 14 & 1),
        trans_a=trans_a,
        trans_b=trans_b,
        n=n,
        rows=m // group,
        group=group,
        parts=split,
        spread=(group, m) == (1, 64) and not variant.ws,
    )


def _check_shape(m: int, n: int, variant: Variant) -> None:
    if variant.ws:
        fits = variant.group == 1 and m in (32, 64, 128) and n in (64, 128, 256)
    else:
        step = 8 if (variant.group, m) == (1, 64) else 16
        fits = (variant.group, m) in _SHAPES and 0 < n <= 256 and n % step == 0
    if not fits:
        suffix = ".ws" if variant.ws else ""
        raise DescriptorFault(
            f"tcgen05.mma{suffix} with M = {m}, N = {n} in cta_group::{variant.group}"
        )


@instruction("tcgen05.mma")
def mma(e: Emitter, ins: Instruction) -> None:
    kind = next((m.split("::")[1] for m in ins.mods if m.startswith("kind::")), "")
    known = ("mma", "ws", "cta_group::1", "cta_group::2", f"kind::{kind}")
    # which buffer keeps A or B has no effect that a program can see
    hints = [m for m in ins.mods if m not in known and not m.startswith("collector::")]
    if hints or kind not in _INPUTS:
        raise Unmodelled(e.text)
    d, a, b, descriptor, *rest = ins.operands
    if rest and isinstance(rest[0], Address):
        raise Unmodelled(e.text)
    disabled = "()"
    if rest and isinstance(rest[0], Vector):
        disabled = "(" + "".join(e.get(item, "u32") + ", " for item in rest[0].items) + ")"
        rest = rest[1:]
    accumulate, *scale = rest
    power = 0
    if scale:
        if len(scale) > 1 or not isinstance(scale[0], Imm):
            raise Unmodelled(e.text)
        power = scale[0].value
    in_tmem = isinstance(a, Address)
    variant = Variant(kind, group_of(ins), ins.has("ws"), in_tmem, power)
    left = e.address(a, "u32") if in_tmem else e.get(a, "u64")
    names = (e.address(d, "u32"), left, e.get(b, "u64"), e.get(descriptor, "u32"))
    flags = f"{e.get(accumulate, 'b1')}, {disabled}, {e.name_of(variant, 'mma')}"
    e.line(e.call(issue, "g", f"({', '.join(names)})", f"({flags})", e.mask))


def issue(g: Gang, operands: tuple[Any, ...], flags: tuple[Any, ...], mask: Any) -> None:
    """Start a product for each lane that issues one."""
    add, disabled, variant = flags
    for lane in issuing(g, mask):
        d, a, b, bits = (at_lane(value, lane) for value in operands)
        form = form_of(bits, variant)
        if form.group == 2 and (g.cta.rank % 2 or len(g.cta.peers) < 2):
            raise TmemFault("tcgen05.mma.cta_group::2 must be issued by the even CTA of a pair")
        ctas = g.cta.peers[g.cta.rank : g.cta.rank + form.group]
        product = Product(form, variant, ctas, (d, a, b), bool(at_lane(add, lane)))
        product.keep([at_lane(word, lane) for word in disabled])
        memory, warp = tensor_memory(g.cta), int(g.warps[lane // 32])
        before = (memory.pipes[warp],) if warp in memory.pipes else ()
        watch, agent = fences_of(g.cta), (g.cta.rank, warp)
        if watch is not None:
            product.look_for_fences(watch, agent)
        op = AsyncOp("tcgen05.mma", product.told(watch, agent), before, owner=g.cta)
        product.claim(op, g.cta.agent(warp))
        for kind, nbytes in product.traffic().items():
            g.cta.machine.traffic[kind][warp] += nbytes
        memory.pipes[warp] = g.cta.machine.queue.add(op)
        if g.cta.race is not None:
            for cta, part in itertools.product(ctas, product.words()):
                cta.smem.check(WORD * part, WORD, WORD, "an operand of a tcgen05.mma")
                where = part + g.cta.words_to(cta)
                copy = g.cta.race.issue_product(warp, where, "a tcgen05.mma")
                memory.reading.setdefault(warp, []).append(copy)


class Product:
    """One tcgen05.mma on the CTAs that take part."""

    def __init__(
        self, form: Form, variant: Variant, ctas: list[Any], operands: tuple[int, ...], add: bool
    ) -> None:
        self.form, self.ctas, self.add, self.scale = form, ctas, add, 0.5**variant.scale
        self.integer = variant.kind == "i8"
        self.kept: np.ndarray | None = None  # (CTAs, lanes) that the product leaves as they are
        d, a, b = operands
        self.shift = d >> 16
        if self.shift not in ((0, 16) if form.spread else (0,)):
            raise TmemFault(f"tcgen05.mma with D at {d:#x}")
        if variant.in_tmem and a >> 16 != self.shift:
            raise TmemFault(f"tcgen05.mma with D at {d:#x} and A at {a:#x}")
        if variant.in_tmem and form.trans_a:
            raise DescriptorFault("tcgen05.mma with a transposed A in tensor memory")
        if variant.in_tmem and form.a.bits < 8:
            raise Unmodelled(f"tcgen05.mma with A of {form.a.name} in tensor memory")
        self.target = d & 0xFFFF, (d & 0xFFFF) + form.n // form.parts
        self.held = (a & 0xFFFF, (a & 0xFFFF) + CELLS) if variant.in_tmem else None
        self.left = None if variant.in_tmem else decode(a, True)
        self.right = decode(b, True)

    def traffic(self) -> dict[str, int]:
        """Bytes that move: operands of 32 bytes of K a row, and D, which is read if it is added."""
        rows = self.form.rows * self.form.group
        a, b = 4 * CELLS * rows, 4 * CELLS * self.form.n
        d = 4 * self.form.n * rows * (1 + self.add)
        in_tmem = self.left is None
        return {"shared": b if in_tmem else a + b, "tmem": a + d if in_tmem else d}

    def keep(self, words: list[int]) -> None:
        """Note the lanes that a disable-output-lane vector names, 32 a word, CTA after CTA."""
        if not any(words):
            return
        if len(words) != 4 * self.form.group:
            raise DescriptorFault(f"a disable-output-lane vector of {len(words)} words")
        bits = np.array(words, np.uint32).view(np.uint8)
        self.kept = np.unpackbits(bits, bitorder="little").view(np.bool_).reshape(-1, LANES)

    def words(self) -> list[np.ndarray]:
        """The words of shared memory that the product reads, operand by operand."""
        form = self.form
        span = 0, form.n // form.group
        found = [words(self.right, *span, form.trans_b, form.b.container)]
        if self.left is not None:
            found.append(words(self.left, 0, form.rows, form.trans_a, form.a.container))
        return found

    def regions(self, columns: tuple[int, int]) -> list[Region]:
        """The cells of `columns` in the lanes that the product uses."""
        if not self.form.spread:
            return [Region(*columns)]
        return [Region(*columns, at, at + 16) for at in range(self.shift, LANES, 32)]

    def claim(self, op: AsyncOp, warp: int) -> None:
        """Check the cells that it touches, issued by `warp` of the cluster, and mark them."""
        for cta, region, writes in self.touched():
            memory, what = tensor_memory(cta), f"a tcgen05.mma's {'D' if writes else 'A'}"
            memory.in_pipe(region, writes, what)
            if memory.races is not None:
                memory.races.access(PIPE, warp, region, writes, what)
            memory.fly(op, region, writes)

    def touched(self) -> list[tuple[Any, Region, bool]]:
        """(CTA, cells, whether they are written) of all that the product uses."""
        found = [(cta, region, True) for cta in self.ctas for region in self.regions(self.target)]
        if self.held is not None:
            found += [(cta, r, False) for cta in self.ctas for r in self.regions(self.held)]
        return found

    def look_for_fences(self, watch: FenceWatch, agent: tuple[int, int]) -> None:
        for cta, region, writes in self.touched():
            watch.check(agent, cta.rank, region, writes, "a tcgen05.mma")

    def told(self, watch: FenceWatch | None, agent: tuple[int, int]) -> Callable[[], None]:
        """`run`, with word to the watch that the product is done."""

        def run() -> None:
            self.run()
            if watch is not None:
                for cta, region, writes in self.touched():
                    watch.log(agent, cta.rank, region, writes)

        return run

    def run(self) -> None:
        form = self.form
        span = (0, form.n // form.group)
        halves = [operand(c.smem, self.right, span, form.trans_b, form.b) for c in self.ctas]
        b = halves[0] if len(halves) == 1 else np.concatenate(halves)
        if form.negated:
            b = -b
        for index, cta in enumerate(self.ctas):
            total = self.product(cta, b)
            lanes = self.lanes()
            whole = tensor_memory(cta).data[self.target[0] : self.target[1]]
            cells = whole.view(np.int32 if self.integer else np.float32)
            if lanes is not None or self.kept is not None:
                chosen = np.arange(LANES) if lanes is None else lanes
                if self.kept is not None:
                    taken = ~self.kept[index, chosen]
                    chosen, total = chosen[taken], total[:, taken]
                if self.add:
                    total = total + cells[:, chosen] * self.scale
                cells[:, chosen] = self.rounded(total)
                continue
            if self.add:
                total += cells if self.scale == 1 else cells * self.scale
            cells[:] = self.rounded(total)

    def rounded(self, total: np.ndarray) -> np.ndarray:
        return total.astype(np.int64).astype(np.int32) if self.integer else total

    def lanes(self) -> np.ndarray | None:
        """The lane of each row where rows do not fill them in order."""
        if not self.form.spread:
            return None
        row = np.arange(64)
        return 32 * (row // 16) + row % 16 + self.shift

    def product(self, cta: Any, b: np.ndarray) -> np.ndarray:
        """(columns, lanes): tensor memory is kept column by column."""
        form = self.form
        if self.left is not None:
            rows = operand(cta.smem, self.left, (0, form.rows), form.trans_a, form.a)
            if form.parts == 1:
                return b @ rows.T
            groups = [rows] * form.parts
        else:
            rows = self.rows_in_tmem(cta)
            if form.parts == 1:
                return b @ rows.T
            groups = np.split(rows, form.parts)
        parts = np.split(b, form.parts)
        products = [part @ group.T for part, group in zip(parts, groups, strict=True)]
        return np.concatenate(products, axis=1)

    def rows_in_tmem(self, cta: Any) -> np.ndarray:
        """A's rows, (lanes, elements along K)."""
        assert self.held is not None
        cells = tensor_memory(cta).data[self.held[0] : self.held[1]].T
        lanes = self.lanes()
        cells = cells if lanes is None else cells[lanes]
        return self.form.a.widen(np.ascontiguousarray(cells))
