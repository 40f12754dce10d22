"""The matrix products of the tensor core, as PTX knows them: descriptors, and one step of 16.

S = Q K^T with both operands in shared memory, O += P V with P in tensor memory. Bits by the PTX
manual, tcgen05: "Shared memory descriptor" and "Instruction descriptor".
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from .tiles import BLOCK_M, TileConfig, swizzle_columns

STEP = 16  # of the contraction, one instruction
UNIT = 16  # bytes, in which descriptors count
ADDRESS_MASK = 0x3FFF
FLOAT32_ACCUMULATOR = 1 << 4
TRANSPOSED_B = 1 << 16  # B with the row index contiguous
DESCRIPTOR_VERSION = 1 << 46 - 32  # in the upper word, like the swizzle
SWIZZLES = {128: 2 << 61 - 32, 64: 4 << 61 - 32, 32: 6 << 61 - 32}  # by bytes of an atom's rows


@dataclass(frozen=True)
class SmemOperand:
    """Tiles (rows, columns) of 16-bit elements in slots `slot_bytes` apart, columns contiguous.

    Atoms of 8 rows and one swizzle width follow each other along the rows, then along the columns.
    `transposed`: the contraction runs over the rows, as in P V, not over the columns.
    """

    rows: Constexpr[int]
    columns: Constexpr[int]
    slot_bytes: Constexpr[int]
    transposed: Constexpr[bool]
    base: Int32  # address in shared memory

    @property
    def row_bytes(self) -> int:
        return 2 * swizzle_columns(self.columns)

    @property
    def upper(self) -> int:
        """The constant half: stride between groups of 8 rows, version, swizzle."""
        return 8 * self.row_bytes // UNIT | DESCRIPTOR_VERSION | SWIZZLES[self.row_bytes]

    def lower(self, slot: Int32) -> Int32:
        """Start address of a slot, and the stride between atoms along the columns."""
        start = (self.base + slot * self.slot_bytes) // UNIT
        stride = self.rows * self.row_bytes // UNIT if self.transposed else 1
        return (start & ADDRESS_MASK) | stride << 16

    def at(self, name: str, lower: str, step: int) -> list[str]:
        """PTX that sets the register `name` to the descriptor of the step-th 16."""
        if self.offset(step) == 0:
            return [f"mov.b64 {name}, {{{lower}, {self.upper}}};"]
        return [
            f"add.u32 lower, {lower}, {self.offset(step)};",
            f"mov.b64 {name}, {{lower, {self.upper}}};",
        ]

    def offset(self, step: int) -> int:
        """What `lower` of the step-th 16 of the contraction is greater by."""
        if self.transposed:
            return step * STEP * self.row_bytes // UNIT
        atom, inside = divmod(2 * STEP * step, self.row_bytes)
        return (atom * self.rows * self.row_bytes + inside) // UNIT


@dataclass(frozen=True)
class Products:
    """The two products for one element type and one tile configuration."""

    dtype: Constexpr[type[cutlass.Numeric]]
    cfg: Constexpr[TileConfig]

    def instruction(self, n: int, transposed: bool) -> int:
        """The instruction descriptor of a (128, n) product, (256, n) for a pair of CTAs."""
        kind, m = int(self.dtype is cutlass.BFloat16), self.cfg.ctas * BLOCK_M
        bits = FLOAT32_ACCUMULATOR | kind << 7 | kind << 10 | n // 8 << 17 | m // 16 << 24
        return bits | TRANSPOSED_B if transposed else bits


@dsl_user_op
def multiply(target: tuple, a, b, steps: range, accumulate, *, loc=None, ip=None):
    """D = A B, or D += A B, over some steps of 16; by one thread, done when committed.

    target: D's column of tensor memory, the instruction descriptor, and how many CTAs take part.
    a: the column where A begins, or (operand, lower word) of its descriptor; b: such a pair. All of
    it is one piece of assembly, with the offsets of the steps inside. Columns may be known only at
    run time.
    """
    (d, instruction, ctas), in_tmem = target, not isinstance(a, tuple)
    operands = [a if in_tmem else a[1], b[1], accumulate, d]
    lines = [
        ".reg .pred add;\n.reg .b64 a, b;\n.reg .b32 d, left, lower;",
        f"mov.b32 d, {d if isinstance(d, int) else '$3'};",
        "setp.ne.b32 add, $2, 0;",
    ]
    for step in steps:
        # In tensor memory, two elements of A to a column.
        first = step * STEP // 2
        if not in_tmem:
            lines += a[0].at("a", "$0", step)
        elif isinstance(a, int):
            lines.append(f"mov.b32 left, {a + first};")
        else:
            lines.append(f"add.u32 left, $0, {first};")
        lines += b[0].at("b", "$1", step)
        left = "[left]" if in_tmem else "a"
        mma = f"tcgen05.mma.cta_group::{ctas}.kind::f16"
        lines.append(f"{mma} [d], {left}, b, {instruction}, add;")
        if step == steps[0]:
            lines.append("setp.eq.b32 add, 0, 0;")
    llvm.inline_asm(
        None,
        [Int32(x).ir_value(loc=loc, ip=ip) for x in operands],
        "{\n" + "\n".join(lines) + "\n}\n",
        "r,r,r,r",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def smem_address(tensor: cute.Tensor) -> Int32:
    """Where a tensor begins in shared memory."""
    return Int32(tensor.iterator.toint())
