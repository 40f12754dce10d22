"""Small PTX programs that run on a card and in the emulator; what each may differ in.

A program is one kernel of a few instructions. It gets two buffers of 32-bit words, `source` and
`target`, and perhaps tensor maps over them. Inputs come from a frozen generator, so that only
what a program leaves in `target` has to be kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ARCH = "sm_90a"

HEADER = f""".version 8.6
.target {ARCH}
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry program(
.param .u64 source,
.param .u64 target,
.param .align 64 .b8 map[128]
)
CLUSTER
{{
.reg .pred %p<16>;
.reg .b16 %h<64>;
.reg .b32 %r<300>;
.reg .b32 %f<300>;
.reg .b64 %rd<64>;
"""
# %r1 shared memory, %r2 thread, %r3 block, %r4 thread of the grid; %rd4 and %rd5 its words
PROLOGUE = """ld.param.b64 %rd1, [source];
ld.param.b64 %rd2, [target];
mov.u32 %r1, smem;
mov.u32 %r2, %tid.x;
mov.u32 %r3, %ctaid.x;
mov.u32 %r5, %ntid.x;
mad.lo.u32 %r4, %r3, %r5, %r2;
mul.wide.u32 %rd3, %r4, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
"""


@dataclass(frozen=True)
class Map:
    """A tensor map over `source` (or over `target`) of 16-bit elements, dimension 0 innermost.

    Strides are in bytes, of dimensions 1 on. Swizzle 0 to 3: none, 32, 64, 128 bytes.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    nan_fill: bool = False
    over_target: bool = False


@dataclass(frozen=True)
class Program:
    """`rule` says how the results must agree: see `agreement.py`."""

    body: str
    source: np.ndarray
    words: int
    rule: str = "bits"
    threads: int = 256
    blocks: int = 1
    smem: int = 0
    map: Map | None = None
    cluster: int = 1

    @property
    def ptx(self) -> str:
        shape = f".explicitcluster\n.reqnctapercluster {self.cluster}" if self.cluster > 1 else ""
        return HEADER.replace("CLUSTER", shape) + PROLOGUE + self.body + "\nret;\n}\n"

    def empty_target(self) -> np.ndarray:
        """`target` as it is before the launch; no program leaves this value by chance."""
        return np.full(self.words, 0xABABABAB, np.uint32)


PROGRAMS: dict[str, Program] = {}


def add(name: str, program: Program) -> None:
    assert name not in PROGRAMS, name
    PROGRAMS[name] = program


# ---- inputs ----
def generator(seed: int) -> np.random.RandomState:
    """NumPy's legacy generator: its stream is frozen."""
    return np.random.RandomState(seed)


CORNERS = np.array(
    [0, 1, 2, 3, 31, 32, 33, 63, 64, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF]
    + [0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x3F800000, 0xBF800000, 0x00800000]
    + [0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F000000, 0x477FE000],
    np.uint32,
)


def integers(seed: int, count: int) -> np.ndarray:
    """Words of all sizes, and corner cases."""
    draw = generator(seed)
    words = draw.randint(0, 1 << 32, count, dtype=np.uint64) >> draw.randint(0, 32, count).astype(
        np.uint64
    )
    words = words.astype(np.uint32)
    at = draw.permutation(count)[: count // 4]
    words[at] = CORNERS[draw.randint(0, len(CORNERS), len(at))]
    return words


def floats(seed: int, count: int, spread: float = 4.0) -> np.ndarray:
    """Normal floats times powers of two, any bits at all, and corner cases, in equal parts."""
    draw = generator(seed)
    values = draw.standard_normal(count) * np.exp2(spread * draw.standard_normal(count))
    words = values.astype(np.float32).view(np.uint32).copy()
    kind = draw.randint(0, 8, count)
    anything = draw.randint(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    corners = CORNERS[draw.randint(0, len(CORNERS), count)]
    return np.where(kind == 0, anything, np.where(kind == 1, corners, words)).astype(np.uint32)


def pairs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two arrays of 16-bit values as words."""
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits of float values as bf16, toward zero."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def f16(values: np.ndarray) -> np.ndarray:
    """Bits of float values as f16."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)


# ---- programs that do the same in each thread ----
COUNT = 512


def each(
    name: str, body: str, inputs: list[np.ndarray], outputs: int = 1, rule: str = "bits"
) -> None:
    """$a, $b, $c in `body` are the thread's words of the inputs; it sets $x, $y, $z."""
    count = len(inputs[0])
    text = ""
    for index in range(len(inputs)):
        text += f"ld.global.b32 %r{10 + index}, [%rd4+{4 * count * index}];\n"
    for index in range(4):
        body = body.replace("$" + "abcd"[index], f"%r{10 + index}")
        body = body.replace("$" + "xyzw"[index], f"%r{20 + index}")
    text += body.replace("; ", ";\n") + "\n"
    for index in range(outputs):
        text += f"st.global.b32 [%rd5+{4 * count * index}], %r{20 + index};\n"
    source = np.concatenate(inputs)
    assert count % 256 == 0
    add(name, Program(text, source, count * outputs, rule, 256, count // 256))


def many(names: str, make: Callable[[str], None]) -> None:
    """Call `make` with each word of `names`."""
    for name in names.split():
        make(name)
