"""mma.sync and wgmma of 8-bit formats, and the wgmma.fence that registers need."""

import numpy as np
import pytest
import torch

from ptx_emulator.findings import Race
from ptx_emulator.machine.formats import FORMATS

from .programs import run

LANE = np.arange(32)


def load_words(first, count, at):
    """PTX that loads `count` registers of a lane from words at + 32 i + lane."""
    return "".join(
        f"ld.global.b32 %r{first + i}, [%rd2+{4 * (at + 32 * i)}];\n" for i in range(count)
    )


def store_words(first, count, at):
    return "".join(
        f"st.global.b32 [%rd2+{4 * (at + 32 * i)}], %r{first + i};\n" for i in range(count)
    )


def names(first, count):
    return ", ".join(f"%r{first + i}" for i in range(count))


BASE = "shl.b32 %r5, %r2, 2;\ncvt.u64.u32 %rd2, %r5;\nadd.s64 %rd2, %rd1, %rd2;\n"


def matrix(generator, name, rows):
    """Finite random codes (rows, 32) and their values."""
    codes = generator.integers(0, 256, (rows, 32)).astype(np.uint8)
    codes = np.where(np.isfinite(FORMATS[name].table[codes]), codes, 0).astype(np.uint8)
    return codes, FORMATS[name].table[codes]


@pytest.mark.parametrize(
    ("first", "second"), [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("s8", "s8"), ("u8", "s8")]
)
def test_mma_sync_m16n8k32(first, second):
    """Lane l: rows l / 4 and 8 further, bytes 4 (l % 4) on and 16 further; columns 2 (l % 4)."""
    generator = np.random.default_rng(0)
    (a, wide_a), (b, wide_b) = matrix(generator, first, 16), matrix(generator, second, 8)
    kind = "s32" if first[1:] == "8" else "f32"
    words_a, words_b = a.view(np.uint32), b.view(np.uint32)
    row, word = LANE // 4, LANE % 4
    registers = [words_a[row + 8 * (i % 2), word + 4 * (i // 2)] for i in range(4)]
    registers += [words_b[row, word + 4 * i] for i in range(2)]
    data = torch.zeros(32 * 10, dtype=torch.int32)
    data[: 32 * 6] = torch.from_numpy(np.concatenate(registers).view(np.int32))
    zero = "".join(f"mov.b32 %r{30 + i}, 0;\n" for i in range(4))
    text = f"mma.sync.aligned.m16n8k32.row.col.{kind}.{first}.{second}.{kind} "
    text += f"{{{names(30, 4)}}}, {{{names(10, 4)}}}, {{{names(14, 2)}}}, {{{names(30, 4)}}};\n"
    run(BASE + load_words(10, 6, 0) + zero + text + store_words(30, 4, 32 * 6), data=data)
    right = (wide_a @ wide_b.T).astype(np.int32 if kind == "s32" else np.float32)
    found = data[32 * 6 :].numpy().reshape(4, 32).view(right.dtype)
    for i in range(4):
        assert np.array_equal(found[i], right[row + 8 * (i // 2), 2 * word + i % 2])


FENCE = "wgmma.fence.sync.aligned;\n"
WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
CLEAR = "".join(f"mov.b32 %r{20 + i}, 0;\n" for i in range(4))
# 32 bytes along K of 64 rows of A at shared offset 0, of 8 rows of B at 2048
OPERANDS = f"""shl.b32 %r5, %r2, 4;
add.s32 %r6, %r1, %r5;
mov.b32 %r7, 0x38383838;
st.shared.v4.b32 [%r6], {{%r7, %r7, %r7, %r7}};
st.shared.v4.b32 [%r6+2048], {{%r7, %r7, %r7, %r7}};
fence.proxy.async.shared::cta;
bar.sync 0;
shr.u32 %r8, %r1, 4;
cvt.u64.u32 %rd5, %r8;
add.s64 %rd5, %rd5, {(128 >> 4) << 32 | (1024 >> 4) << 16};
add.s64 %rd6, %rd5, {2048 >> 4};
mov.pred %p5, 1;
"""


def wgmma(kinds="e4m3.e4m3", first=20):
    registers = names(first, 4)
    text = f"wgmma.mma_async.sync.aligned.m64n8k32.f32.{kinds} "
    return text + f"{{{registers}}}, %rd5, %rd6, %p5, 1, 1;\n"


def run_wgmma(body, before=OPERANDS):
    store = "cvt.u64.u32 %rd3, %r5;\nadd.s64 %rd3, %rd1, %rd3;\n"
    store += f"st.global.v4.b32 [%rd3], {{{names(20, 4)}}};\n"
    data = torch.zeros(512, dtype=torch.int32)
    return run(before + body + store, warps=4, smem=8192, arch="sm_90a", data=data)


def test_wgmma_of_e4m3():
    found = run_wgmma(CLEAR + FENCE + wgmma() + wgmma() + WAIT).view(torch.float32)
    assert (found == 64).all()  # 2 products of 32 ones


@pytest.mark.parametrize(
    "body",
    [
        CLEAR + wgmma() + WAIT,
        FENCE + CLEAR + wgmma() + WAIT,
        CLEAR + FENCE + wgmma() + WAIT + "add.f32 %r21, %r21, %r22;\n" + wgmma() + WAIT,
    ],
)
def test_registers_written_since_the_fence(body):
    with pytest.raises(Race, match="wgmma.fence"):
        run_wgmma(body)


def test_products_and_moves_need_no_fence():
    moved = "".join(f"mov.b32 %r{30 + i}, %r{20 + i};\n" for i in range(4))
    run_wgmma(CLEAR + FENCE + wgmma() + WAIT + moved + wgmma(first=30) + WAIT)


def test_operands_that_no_fence_makes_visible():
    body = CLEAR + FENCE + wgmma() + WAIT
    with pytest.raises(Race, match="no fence.proxy.async"):
        run_wgmma(body, OPERANDS.replace("fence.proxy.async.shared::cta;", ""))


def test_operands_overwritten_while_they_are_read():
    start, store = CLEAR + FENCE + wgmma(), "st.shared.b32 [%r6+2048], %r2;\n"
    run_wgmma(start + WAIT + "bar.sync 0;\n" + store)
    with pytest.raises(Race, match="product"):
        run_wgmma(start + store + WAIT)
    with pytest.raises(Race, match="not ordered after"):
        run_wgmma(start + WAIT + store)  # other warps may still read
