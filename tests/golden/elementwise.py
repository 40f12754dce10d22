"""Programs of one arithmetic instruction: integer, f32, halves, conversions, approximations."""

import numpy as np

from .programs import COUNT, bf16, each, f16, floats, generator, integers, pairs

I = [integers(seed, COUNT) for seed in (1, 2, 3)]  # noqa: E741
F = [floats(seed, COUNT) for seed in (4, 5, 6)]
SHIFTS = generator(7).randint(0, 70, COUNT).astype(np.uint32)


def unary(instruction: str, inputs: np.ndarray, rule: str = "bits") -> None:
    each(instruction, f"{instruction} $x, $a;", [inputs], rule=rule)


def binary(instruction: str, inputs: list[np.ndarray], rule: str = "bits") -> None:
    each(instruction, f"{instruction} $x, $a, $b;", inputs[:2], rule=rule)


def ternary(instruction: str, inputs: list[np.ndarray], rule: str = "bits") -> None:
    each(instruction, f"{instruction} $x, $a, $b, $c;", inputs, rule=rule)


def wide(instruction: str, inputs: list[np.ndarray]) -> None:
    """A 64-bit result from words; %rd10 = {c, a} may be an addend."""
    operands = ", ".join(["$a", "$b", "%rd10"][: 3 if instruction.startswith("mad") else 2])
    body = f"mov.b64 %rd10, {{$a, $c}}; {instruction} %rd11, {operands}; mov.b64 {{$x, $y}}, %rd11;"
    each(instruction, body, inputs, 2)


def long(instruction: str, inputs: list[np.ndarray]) -> None:
    """A 64-bit instruction on {a, b} and {c, a}."""
    body = "mov.b64 %rd10, {$a, $b}; mov.b64 %rd11, {$c, $a}; "
    each(
        instruction,
        body + f"{instruction} %rd12, %rd10, %rd11; mov.b64 {{$x, $y}}, %rd12;",
        inputs,
        2,
    )


def compared(instruction: str, inputs: list[np.ndarray]) -> None:
    body = f"{instruction} %p1, $a, $b; selp.b32 $x, 1, 0, %p1;"
    each(instruction, body, inputs[:2])


def integer_programs() -> None:
    for kind in ("u32", "s32"):
        for name in ("mul.lo", "mul.hi", "min", "max", "div", "rem"):
            binary(f"{name}.{kind}", I)
        wide(f"mul.wide.{kind}", I)
        wide(f"mad.wide.{kind}", I)
        ternary(f"mad.lo.{kind}", I)
        ternary(f"mad.hi.{kind}", I)
        each(f"shr.{kind}", f"shr.{kind} $x, $a, $b;", [I[0], SHIFTS])
        each(f"bfe.{kind}", f"bfe.{kind} $x, $a, $b, $c;", [I[0], SHIFTS, I[2]])
        unary(f"bfind.{kind}", I[0])
        unary(f"bfind.shiftamt.{kind}", I[0])
        for order in ("lt", "le", "gt", "ge"):
            compared(f"setp.{order}.{kind}", I)
    for name in ("add.s32", "sub.s32", "and.b32", "or.b32", "xor.b32", "mul24.lo.u32"):
        binary(name, I)
    for name in ("neg.s32", "abs.s32", "not.b32", "popc.b32", "clz.b32", "brev.b32", "cnot.b32"):
        unary(name, I[0])
    long("add.s64", I)
    long("mul.lo.s64", I)
    long("mul.hi.u64", I)
    long("mul.hi.s64", I)
    long("min.s64", I)
    each("shl.b32", "shl.b32 $x, $a, $b;", [I[0], SHIFTS])
    each(
        "shl.b64",
        "mov.b64 %rd10, {$a, $b}; shl.b64 %rd11, %rd10, $c; mov.b64 {$x, $y}, %rd11;",
        [I[0], I[1], SHIFTS],
        2,
    )
    for mode in ("l.wrap", "r.wrap", "l.clamp", "r.clamp"):
        each(f"shf.{mode}.b32", f"shf.{mode}.b32 $x, $a, $b, $c;", [I[0], I[1], SHIFTS])
    each("bfi.b32", "bfi.b32 $x, $a, $b, $c, $d;", [I[0], I[1], SHIFTS, SHIFTS[::-1]])
    ternary("prmt.b32", I)
    for table in (0x96, 0xCA, 0xE8, 0xF8, 0x1D):
        each(f"lop3.b32 {table:#x}", f"lop3.b32 $x, $a, $b, $c, {table};", I)
    ternary("sad.u32", I)
    each("mul.lo.u16", "cvt.u16.u32 %h1, $a; cvt.u16.u32 %h2, $b; mul.lo.u16 %h3, %h1, %h2; "
         "mul.wide.s16 $y, %h1, %h2; cvt.u32.u16 $x, %h3;", I[:2], 2)  # fmt: skip


def float_programs() -> None:
    for name in ("add", "sub", "mul"):
        for mode in ("rn", "rz", "rm", "rp", "rn.ftz"):
            binary(f"{name}.{mode}.f32", F, "f32")
    for mode in ("rn", "rz", "rm", "rp", "rn.ftz", "rn.sat"):
        ternary(f"fma.{mode}.f32", F, "f32")
    for name in ("min", "max", "min.ftz", "max.ftz", "max.NaN"):
        binary(f"{name}.f32", F, "f32")
    each("max.f32 of three", "max.f32 $x, $a, $b; max.f32 $x, $x, $c;", F, rule="f32")
    draw = generator(14)
    few = np.array([0, 0x80000000, 0x3F800000, 0xBF800000, 0x7FC00000, 1], np.uint32)
    zeros = [few[draw.randint(0, len(few), COUNT)] for _ in range(2)]
    for name in ("min", "max", "min.NaN", "max.NaN", "max.ftz"):
        each(f"{name}.f32 of zeros", f"{name}.f32 $x, $a, $b;", zeros, rule="f32")
    unary("neg.f32", F[0], "f32")
    unary("abs.f32", F[0], "f32")
    binary("div.rn.f32", F, "f32")
    unary("sqrt.rn.f32", F[0], "f32")
    unary("rcp.rn.f32", F[0], "f32")
    binary("copysign.f32", F, "f32")
    for order in ("lt", "neu", "gtu", "nan", "num", "equ"):
        compared(f"setp.{order}.f32", F)
    near = [
        F[0],
        (F[0] ^ np.uint32(0x80000000)) + generator(8).randint(0, 9, COUNT).astype(np.uint32),
    ]
    each("add.rn.f32 that cancels", "add.rn.f32 $x, $a, $b;", near, rule="f32")
    tail = "mul.rn.f32 $y, $a, $b; neg.f32 $y, $y; fma.rn.f32 $x, $a, $b, $y;"
    each("fma.rn.f32 that cancels", tail, F[:2], rule="f32")


def half_programs() -> None:
    draw = generator(9)
    for kind, narrow in (("bf16x2", bf16), ("f16x2", f16)):
        values = []
        for seed in (10, 20, 30):
            low, high = floats(seed, COUNT), floats(seed + 1, COUNT, 1.0)
            values.append(pairs(narrow(low.view(np.float32)), narrow(high.view(np.float32))))
        values[0][:64] = draw.randint(0, 1 << 32, 64, dtype=np.uint64).astype(np.uint32)
        for name in ("add.rn", "sub.rn", "mul.rn", "min", "max"):
            binary(f"{name}.{kind}", values, kind)
        ternary(f"fma.rn.{kind}", values, kind)
        unary(f"neg.{kind}", values[0], kind)
        unary(f"abs.{kind}", values[0], kind)
        ex2 = "ex2.approx.ftz.bf16x2" if kind == "bf16x2" else "ex2.approx.f16x2"
        unary(ex2, values[1], f"{kind} 1")
        unary(f"tanh.approx.{kind}", values[1], f"{kind} 1")


def conversion_programs() -> None:
    for mode in ("rn", "rz", "rn.relu"):
        for kind in ("bf16x2", "f16x2"):
            binary(f"cvt.{mode}.{kind}.f32", F, kind)
    unary("cvt.rna.tf32.f32", F[0], "f32")
    for mode in ("rni", "rzi", "rmi", "rpi"):
        unary(f"cvt.{mode}.f32.f32", F[0], "f32")
        for kind in ("s32", "u32"):
            unary(f"cvt.{mode}.{kind}.f32", F[0])
    unary("cvt.sat.f32.f32", F[0], "f32")
    for kind in ("s32", "u32"):
        for mode in ("rn", "rz", "rm", "rp"):
            unary(f"cvt.{mode}.f32.{kind}", I[0])
    each("cvt.rn.f32.u64", "mov.b64 %rd10, {$a, $b}; cvt.rn.f32.u64 $x, %rd10;", I[:2])
    for kind in ("s8", "u8", "s16", "u16"):
        unary(f"cvt.sat.{kind}.s32", I[0])
        each(f"cvt.s32.{kind}", f"cvt.s32.{kind} $x, $a;", [I[0]])
    halves = pairs(I[1] & np.uint32(0xFFFF), I[2] >> np.uint32(16))
    for kind in ("f16", "bf16"):
        widen = f"mov.b32 {{%h1, %h2}}, $a; cvt.f32.{kind} $x, %h1; cvt.f32.{kind} $y, %h2;"
        each(f"cvt.f32.{kind}", widen, [halves], 2, "f32")
        each(
            f"cvt.rn.{kind}.f32",
            f"cvt.rn.{kind}.f32 %h1, $a; mov.b32 $x, {{%h1, %h1}};",
            [F[0]],
            rule=f"{kind}x2",
        )
    for kind in ("e4m3x2", "e5m2x2"):
        for mode in ("rn.satfinite", "rn.satfinite.relu"):
            each(
                f"cvt.{mode}.{kind}.f32",
                f"cvt.{mode}.{kind}.f32 %h1, $a, $b; cvt.u32.u16 $x, %h1;",
                F[:2],
            )
        each(f"cvt.rn.satfinite.{kind}.f16x2",
             f"cvt.rn.satfinite.{kind}.f16x2 %h1, $a; cvt.u32.u16 $x, %h1;", [halves])  # fmt: skip
        all_codes = np.arange(COUNT, dtype=np.uint32) & 255 | np.uint32(0x3700)
        each(
            f"cvt.rn.f16x2.{kind}",
            f"cvt.u16.u32 %h1, $a; cvt.rn.f16x2.{kind} $x, %h1;",
            [all_codes],
            rule="f16x2",
        )


def approximations() -> None:
    """Bounds are the PTX manual's; the emulator is within an ulp of the truth."""
    count = 2048
    draw = generator(11)
    some = floats(12, count)
    small = (draw.uniform(-30, 30, count)).astype(np.float32).view(np.uint32)
    scores = (-np.abs(draw.standard_normal(count)) * 8).astype(np.float32).view(np.uint32)
    for name in ("ex2.approx.ftz.f32", "ex2.approx.f32"):
        unary(name, np.where(np.arange(count) % 2, scores, some), "relative 2^-22")
    for name in ("lg2.approx.ftz.f32", "lg2.approx.f32"):
        unary(name, some & np.uint32(0x7FFFFFFF), "lg2")
    unary("rcp.approx.ftz.f32", some, "relative 2^-22")
    unary("rcp.approx.f32", some, "relative 2^-22")
    unary("sqrt.approx.ftz.f32", some, "relative 2^-22")
    unary("rsqrt.approx.ftz.f32", some, "relative 2^-21.9")
    unary("tanh.approx.f32", np.where(np.arange(count) % 2, some, small), "relative 2^-10.987")
    unary(
        "sin.approx.f32",
        (draw.uniform(-3.14, 3.14, count)).astype(np.float32).view(np.uint32),
        "absolute 2^-20.5",
    )
    unary(
        "cos.approx.f32",
        (draw.uniform(-3.14, 3.14, count)).astype(np.float32).view(np.uint32),
        "absolute 2^-20.5",
    )
    ratio = [F[0], floats(13, COUNT, 2.0)]
    each("div.full.f32", "div.full.f32 $x, $a, $b;", ratio, rule="relative 2^-21")


integer_programs()
float_programs()
half_programs()
conversion_programs()
approximations()
