"""What a parsed PTX kernel consists of."""

from dataclasses import dataclass, field

from ..words import words


@dataclass(frozen=True, slots=True)
class Reg:
    """A virtual register. `index` numbers the kernel's registers, `type` is the declared one."""

    index: int
    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Imm:
    """An integer immediate, or a float one as its bits."""

    value: int
    float_bits: int = 0  # 32 for 0f…, 64 for 0d…, 0 for an integer


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable or a parameter."""

    name: str


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b, …}; an item of None is the sink _."""

    items: tuple["Operand | None", ...]


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset], with the coordinates that TMA puts inside the brackets."""

    base: "Operand"
    offset: int = 0
    coords: tuple["Operand", ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """d|p, the two destinations of shfl, elect, setp and match."""

    first: "Operand | None"
    second: "Operand | None"


@dataclass(frozen=True, slots=True)
class Not:
    """!p as an operand."""

    reg: Reg


Operand = Reg | Imm | Special | Symbol | Vector | Address | Pair | Not


@dataclass(slots=True)
class Instruction:
    """One instruction: `@guard opcode.mods operands;`."""

    opcode: str
    mods: tuple[str, ...]
    operands: tuple[Operand | None, ...]
    guard: Reg | None
    guard_negated: bool
    line: int
    text: str

    def has(self, *names: str) -> bool:
        return any(name in self.mods for name in names)

    @property
    def type(self) -> str:
        """The last modifier that names a type."""
        for mod in reversed(self.mods):
            if mod in TYPES:
                return mod
        return ""


TYPES = frozenset(
    words(
        "pred b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64 f16x2 "
        "bf16x2 f32x2 tf32 e4m3 e5m2 e4m3x2 e5m2x2"
    )
)


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A module-scope or kernel-scope variable. An extern shared one has size 0."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""


@dataclass(slots=True)
class Kernel:
    """One .entry: its code as a flat list, labels being indices into it."""

    name: str
    target: str
    params: list[Param] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    registers: list[Reg] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    max_registers: int = 0
    required_cluster: tuple[int, ...] = ()
