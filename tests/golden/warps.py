"""Programs whose lanes work together: exchange, 8x8 tiles, mma.sync, mbarriers."""

import numpy as np

from .programs import Program, add, bf16, each, f16, generator, integers, many, pairs

WORDS = integers(40, 256)


def exchanges() -> None:
    each("shfl idx", "and.b32 $y, $b, 31; shfl.sync.idx.b32 $x|%p1, $a, $y, 31, -1; "
         "selp.b32 $z, 1, 0, %p1;", [WORDS, WORDS[::-1]], 3)  # fmt: skip
    for mode, lane, clamp in (
        ("bfly", 1, 31), ("bfly", 2, 31), ("bfly", 16, 31), ("bfly", 4, 0x181F), ("up", 1, 0),
        ("up", 5, 0), ("up", 3, 0x1800), ("down", 1, 31), ("down", 7, 31), ("down", 3, 0x181F),
        ("idx", 0, 31), ("idx", 5, 0x181F), ("idx", 20, 0x1C1F), ("idx", 9, 7),
    ):  # fmt: skip
        body = f"shfl.sync.{mode}.b32 $x|%p1, $a, {lane}, {clamp}, -1; selp.b32 $y, 1, 0, %p1;"
        each(f"shfl {mode} {lane} {clamp:#x}", body, [WORDS], 2)
    for limit in (0, 1, 255, 0x7FFFFFFF):
        body = f"setp.gt.s32 %p1, $a, {limit}; vote.sync.ballot.b32 $x, %p1, -1;"
        for target, mode in (("$y", "any"), ("$z", "all"), ("$w", "uni")):
            body += f" vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 {target}, 1, 0, %p2;"
        each(f"vote {limit}", body, [WORDS], 4)
    many("add.u32 add.s32 min.u32 min.s32 max.u32 max.s32 and.b32 or.b32 xor.b32",
         lambda m: each(f"redux.{m}", f"redux.sync.{m} $x, $a, -1;", [WORDS]))  # fmt: skip
    each("match", "and.b32 $y, $a, 7; match.any.sync.b32 $x, $y, -1;", [WORDS])
    each("elect", "elect.sync $x|%p1, -1; selp.b32 $y, 1, 0, %p1;", [WORDS], 2)
    each("movmatrix", "movmatrix.sync.aligned.m8n8.trans.b16 $x, $a;", [WORDS])
    # the lanes that take part: the even ones
    each("some lanes", "mov.b32 $x, 0; mov.b32 $y, 0; and.b32 $z, %r2, 1; setp.eq.s32 %p1, $z, 0; "
         "@!%p1 bra $over; redux.sync.add.s32 $x, $a, 0x55555555; "
         "shfl.sync.bfly.b32 $y, $a, 2, 31, 0x55555555; $over:", [WORDS], 2)  # fmt: skip


# A warp's 1024 bytes of shared memory are filled with its words; lane l gives row l, permuted.
FILL = """shr.u32 %r6, %r2, 5;
and.b32 %r7, %r2, 31;
shl.b32 %r8, %r6, 10;
add.s32 %r8, %r8, %r1;
mul.wide.u32 %rd6, %r6, 1024;
add.s64 %rd6, %rd6, %rd1;
mul.wide.u32 %rd7, %r7, 32;
add.s64 %rd6, %rd6, %rd7;
shl.b32 %r9, %r7, 5;
add.s32 %r9, %r9, %r8;
ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd6];
ld.global.v4.b32 {%r34, %r35, %r36, %r37}, [%rd6+16];
st.shared.v4.b32 [%r9], {%r30, %r31, %r32, %r33};
st.shared.v4.b32 [%r9+16], {%r34, %r35, %r36, %r37};
bar.sync 0;
mul.lo.u32 %r10, %r7, 13;
and.b32 %r10, %r10, 63;
shl.b32 %r10, %r10, 4;
add.s32 %r10, %r10, %r8;
"""


def tiles() -> None:
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            regs = ", ".join(f"%r{20 + i}" for i in range(count))
            stores = "".join(f"st.global.b32 [%rd5+{256 * i}], %r{20 + i};\n" for i in range(count))
            text = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{regs}}}, [%r10];\n"
            words = integers(41, 512)
            add(
                f"ldmatrix x{count}{trans}",
                Program(FILL + text + stores, words, 64 * count, threads=64, smem=2048),
            )
            body = FILL + "".join(
                f"mul.lo.u32 %r{20 + i}, %r2, {0x10001 + 77 * i};\n" for i in range(count)
            )
            body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r10], {{{regs}}};\n"
            body += "bar.sync 0;\n"
            body += "shl.b32 %r50, %r2, 5;\nadd.s32 %r50, %r50, %r1;\nmul.wide.u32 %rd8, %r2, 32;\n"
            body += "add.s64 %rd8, %rd8, %rd2;\n"
            for half in (0, 16):
                body += f"ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r50+{half}];\n"
                body += f"st.global.v4.b32 [%rd8+{half}], {{%r30, %r31, %r32, %r33}};\n"
            add(f"stmatrix x{count}{trans}", Program(body, words, 512, threads=64, smem=2048))


# ---- mma.sync ----
KINDS = ("normal", "spread", "sparse", "accumulator", "cancel", "tiny", "special")


def factors(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Factors that show how products are added: see each branch."""
    draw = generator(seed)
    values = draw.standard_normal(shape)
    if kind == "spread":  # terms far apart: bits that alignment drops
        values = values * np.exp2(np.rint(6 * draw.standard_normal(shape)))
    if kind == "sparse":  # few terms in a sum, so that each bit dropped shows
        values = (
            values * np.exp2(np.rint(5 * draw.standard_normal(shape))) * (draw.rand(*shape) < 0.3)
        )
    if kind == "tiny":  # denormal results and factors
        values = values * np.exp2(np.rint(-9 + 4 * draw.standard_normal(shape)))
    if kind == "special":
        pick = draw.randint(0, 60, shape)
        for index, value in enumerate((np.inf, -np.inf, np.nan, 0.0, -0.0, 6e4, -6e4)):
            values = np.where(pick == index, value, values)
    return values.astype(np.float32)


def addends(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    draw = generator(seed)
    values = draw.standard_normal(shape) * 4
    if kind in ("spread", "accumulator"):
        values = values * np.exp2(np.rint(12 * draw.standard_normal(shape)))
    if kind == "sparse":
        values = (
            values * np.exp2(np.rint(8 * draw.standard_normal(shape))) * (draw.rand(*shape) < 0.5)
        )
    if kind == "tiny":
        values = values * np.exp2(-20.0)
    if kind == "special":
        pick = draw.randint(0, 60, shape)
        for index, value in enumerate((np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-42)):
            values = np.where(pick == index, value, values)
    return values.astype(np.float32)


WARPS = 8


def mma(shape: str, narrow: str, kind: str, steps: int = 1) -> None:
    """`steps` products, each with factors of its own, added up; each lane loads its fragments."""
    threads, deep = 32 * WARPS, shape == "m16n8k16"
    sizes = (4, 2) if deep else (2, 1)
    cut = bf16 if narrow == "bf16" else f16
    seed = 50 + KINDS.index(kind)
    scale = 2.0**-60 if kind == "tiny" and narrow == "bf16" else 1.0
    total = sum(sizes) * steps
    values = cut(factors(kind, seed, (total, threads, 2)) * np.float32(scale))
    c = addends(kind, seed + 50, (4, threads)) * np.float32(scale) * np.float32(scale)
    if kind == "cancel":  # C near -AB, up to the order of the sum
        values[..., 1] = values[..., 0]
    source = np.concatenate(
        [pairs(values[..., 0], values[..., 1]).ravel(), c.view(np.uint32).ravel()]
    )
    load = "".join(
        f"ld.global.b32 %r{10 + i}, [%rd4+{4 * threads * i}];\n" for i in range(total + 4)
    )
    d = ", ".join(f"%f{i}" for i in range(4))
    text = load + "".join(f"mov.b32 %f{i}, %r{10 + total + i};\n" for i in range(4))
    for step in range(steps):
        first = 10 + step * sum(sizes)
        a = ", ".join(f"%r{first + i}" for i in range(sizes[0]))
        b = ", ".join(f"%r{first + sizes[0] + i}" for i in range(sizes[1]))
        name = f"mma.sync.aligned.{shape}.row.col.f32.{narrow}.{narrow}.f32"
        text += f"{name} {{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};\n"
    text += "".join(f"st.global.b32 [%rd5+{4 * threads * i}], %f{i};\n" for i in range(4))
    name = f"mma {shape} {narrow} {kind}" + (f" x{steps}" if steps > 1 else "")
    add(name, Program(text, source, 4 * threads, "accumulated", threads))


def mma_fp8(kind: str, steps: int) -> None:
    """m16n8k32 with e4m3 factors: all codes but NaN and, unless `spread`, of middle size."""
    draw = generator(60 + steps)
    threads = 32 * WARPS
    low, high = (0x08, 0x78) if kind == "spread" else (0x28, 0x40)
    codes = (
        draw.randint(low, high, (6 * steps, threads, 4))
        | draw.randint(0, 2, (6 * steps, threads, 4)) << 7
    )
    c = addends("spread" if kind == "spread" else "normal", 77, (4, threads))
    words = codes.astype(np.uint8).view(np.uint32)[..., 0]
    source = np.concatenate([words.ravel(), c.view(np.uint32).ravel()])
    load = "".join(
        f"ld.global.b32 %r{10 + i}, [%rd4+{4 * threads * i}];\n" for i in range(6 * steps + 4)
    )
    text = load + "".join(f"mov.b32 %f{i}, %r{10 + 6 * steps + i};\n" for i in range(4))
    d = "{%f0, %f1, %f2, %f3}"
    for step in range(steps):
        r = [f"%r{10 + 6 * step + i}" for i in range(6)]
        text += f"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {d}, "
        text += f"{{{', '.join(r[:4])}}}, {{{', '.join(r[4:])}}}, {d};\n"
    text += "".join(f"st.global.b32 [%rd5+{4 * threads * i}], %f{i};\n" for i in range(4))
    add(f"mma m16n8k32 e4m3 {kind} x{steps}", Program(text, source, 4 * threads, "fp8", threads))


def products() -> None:
    for kind in ("normal", "spread"):
        for steps in (1, 4):
            mma_fp8(kind, steps)
    for narrow in ("bf16", "f16"):
        for kind in KINDS:
            mma("m16n8k16", narrow, kind)
        mma("m16n8k16", narrow, "normal", 16)
        mma("m16n8k16", narrow, "spread", 16)
        mma("m16n8k8", narrow, "spread")


# ---- mbarriers: thread 0 asks for both parities after each step ----
def barriers() -> None:
    text = "mov.b32 %r20, 0;\n"

    def ask() -> str:
        return "".join(
            f"mbarrier.test_wait.parity.shared.b64 %p1, [%r1], {parity};\n"
            "selp.b32 %r21, 1, 0, %p1;\nshl.b32 %r20, %r20, 1;\nor.b32 %r20, %r20, %r21;\n"
            for parity in (0, 1)
        )

    arrive = "mbarrier.arrive.shared.b64 %rd10, [%r1];\n"
    steps = [
        "mbarrier.init.shared.b64 [%r1], 2;\n", arrive, arrive, arrive,
        "mbarrier.arrive.expect_tx.shared.b64 %rd10, [%r1], 64;\n",
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 48;\n",
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 16;\n",
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 32;\n", arrive + arrive,
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 32;\n",
        "mbarrier.arrive.noComplete.shared.b64 %rd10, [%r1], 1;\n", arrive,
    ]  # fmt: skip
    text += "".join(step + ask() for step in steps)
    words = integers(42, 32)
    add("mbarrier parities", Program(f"setp.ne.b32 %p5, %r2, 0;\n@%p5 bra $end;\n{text}"
        "st.global.b32 [%rd2], %r20;\n$end:", words, 1, threads=32, smem=64))  # fmt: skip


exchanges()
tiles()
products()
barriers()
