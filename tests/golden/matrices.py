"""wgmma programs: operands in every layout, and sums that show how products are added."""

import numpy as np

from .programs import Program, add, bf16, f16, generator, pairs
from .warps import KINDS, addends, factors

# All of shared memory is filled with source; %r50: the address as a descriptor's start field
FILL = "shl.b32 %r41, %r2, 2;\nadd.s32 %r41, %r41, %r1;\n"


def filled(nbytes: int) -> str:
    text = FILL
    for at in range(0, nbytes, 512):
        text += f"ld.global.b32 %r42, [%rd4+{at}];\nst.shared.b32 [%r41+{at}], %r42;\n"
    return text + "fence.proxy.async.shared::cta;\nbar.sync 0;\n"


def descriptor(register: str, start: int, leading: int, stride: int, swizzle: int) -> str:
    """A descriptor in `register`; swizzle 0 to 3: none, 32, 64, 128 bytes. All in bytes."""
    constant = leading >> 4 << 16 | stride >> 4 << 32 | (4 - swizzle) % 4 << 62
    return (
        f"add.s32 %r51, %r1, {start};\nshr.u32 %r51, %r51, 4;\ncvt.u64.u32 {register}, %r51;\n"
        f"or.b64 {register}, {register}, {constant:#x};\n"
    )


def multiply(n: int, narrow: str, a: str, majors: tuple[int, ...], kept: bool = True) -> str:
    """One wgmma; it adds to D if `kept`."""
    d = ", ".join(f"%f{i}" for i in range(n // 2))
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{narrow}.{narrow}"
    flags = "".join(f", {major}" for major in majors)
    return f"setp.ne.b32 %p6, {int(kept)}, 0;\n{name} {{{d}}}, {a}, %rd13, %p6, 1, 1{flags};\n"


FENCE = "wgmma.fence.sync.aligned;\n"
DONE = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


def stores(n: int) -> str:
    return "".join(f"st.global.b32 [%rd5+{512 * i}], %f{i};\n" for i in range(n // 2))


SMEM = 16384


def layouts() -> None:
    """Small integers, so that sums are exact: only the addresses are in question."""
    small = generator(70).randint(-2, 3, SMEM // 2).astype(np.float32)
    words = bf16(small).view(np.uint32)
    n = 32
    for swizzle in range(4):
        span = 16 << swizzle if swizzle else 16
        for name, place in {
            # operand: (start, leading, stride); strides keep 64 rows or columns apart
            "K": (2048, 1024 if not swizzle else 16, 8 * span if swizzle else 128),
            "K inside a row": (
                2048 + (32 if swizzle > 1 else 128),
                1024 if not swizzle else 16,
                8 * span if swizzle else 128,
            ),
            "K, other strides": (1024, 512 if not swizzle else 16, 1024 if swizzle < 3 else 2048),
            "MN": (2048, 1024 if swizzle else 256, 2048 if swizzle == 3 else 512),
            "MN, other strides": (1024, 2048, 1024 if swizzle else 128),
        }.items():
            major = int(name.startswith("MN"))
            for side in "AB":
                good = (2048, 16, 1024, 3)  # K-major, 128 bytes
                first, second = (
                    ((*place, swizzle), good) if side == "A" else (good, (*place, swizzle))
                )
                majors = (major, 0) if side == "A" else (0, major)
                text = filled(SMEM) + descriptor("%rd12", *first) + descriptor("%rd13", *second)
                text += FENCE + multiply(n, "bf16", "%rd12", majors, kept=False) + DONE + stores(n)
                add(
                    f"wgmma {side} swizzle {swizzle}, {name}-major",
                    Program(text, words, 64 * n, "bits", 128, smem=SMEM),
                )


def sums() -> None:
    """A from registers, B without swizzle; D starts as C. Two products, one after the other."""
    n, steps = 8, 2
    for narrow, cut in (("bf16", bf16), ("f16", f16)):
        for kind in KINDS:
            seed = 80 + KINDS.index(kind)
            scale = np.float32(2.0**-60 if kind == "tiny" and narrow == "bf16" else 1.0)
            b = cut(factors(kind, seed, (256 * steps, 2)) * scale)
            a = cut(factors(kind, seed + 20, (4 * steps, 128, 2)) * scale)
            c = addends(kind, seed + 40, (n // 2, 128)) * scale * scale
            parts = [pairs(x[..., 0], x[..., 1]).ravel() for x in (b, a)]
            source = np.concatenate([*parts, c.view(np.uint32).ravel()])
            text = filled(1024 * steps)
            base = 1024 * steps
            for i in range(4 * steps):
                text += f"ld.global.b32 %r{60 + i}, [%rd4+{base + 512 * i}];\n"
            for i in range(n // 2):
                text += f"ld.global.b32 %f{i}, [%rd4+{base + 2048 * steps + 512 * i}];\n"
            text += FENCE
            for step in range(steps):
                text += descriptor("%rd13", 1024 * step, 128, 256, 0)
                registers = ", ".join(f"%r{60 + 4 * step + i}" for i in range(4))
                text += multiply(n, narrow, f"{{{registers}}}", (0,))
            text += DONE + stores(n)
            add(
                f"wgmma sums {narrow} {kind}",
                Program(text, source, 64 * n, "accumulated", 128, smem=base),
            )


layouts()
sums()
