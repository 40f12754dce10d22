"""tcgen05 in programs of a few lines: shapes of ld and st, cp, and products of each kind and M.

A program gets an image of shared memory and returns words of tensor memory, (columns, 128 lanes).
"""

import numpy as np
import pytest
import torch

from ptx_emulator.findings import DescriptorFault, OutOfBounds, Race, TmemFault
from ptx_emulator.machine.formats import FORMATS

from .programs import run

COLUMNS = 64  # of tensor memory that a program returns
RESULT = 128 * COLUMNS  # words, before the image of shared memory
SMEM = 64 * 1024

BEGIN = """setp.ne.b32 %p1, %r3, 0;
@%p1 bra $allocated;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 256;
setp.ne.b32 %p2, %r2, 0;
@%p2 bra $allocated;
mbarrier.init.shared.b64 [%r1+8], 1;
fence.mbarrier_init.release.cluster;
$allocated:
shl.b32 %r5, %r2, 4;
cvt.u64.u32 %rd2, %r5;
add.s64 %rd2, %rd1, %rd2;
add.s32 %r5, %r1, %r5;
FILL
fence.proxy.async.shared::cta;
bar.sync 0;
ld.shared.b32 %r4, [%r1];
shl.b32 %r6, %r3, 21;
add.s32 %r6, %r4, %r6;
CLEAR
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
"""
# %r4: the allocation; %r6: the warp's quarter of it
COMMIT = """tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+8];
$issued:
$wait:
mbarrier.try_wait.parity.shared.b64 %p4, [%r1+8], 0;
@%p4 bra $over;
bra $wait;
$over:
tcgen05.fence::after_thread_sync;
"""
ISSUE = "setp.ne.b32 %p3, %r2, 0;\n@%p3 bra $issued;\n{0}" + COMMIT
END = """shl.b32 %r7, %r2, 2;
cvt.u64.u32 %rd3, %r7;
add.s64 %rd3, %rd1, %rd3;
READ
bar.sync 0;
@%p1 bra $end;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 256;
$end:
"""


def names(first, count):
    return ", ".join(f"%r{first + i}" for i in range(count))


def execute(body, image=b"", columns=COLUMNS, first=0, without="none of it", **options):
    """Run `body` on 4 warps, `image` at shared offset 1024; columns from `first` on as uint32.

    `without`: text to leave out; `options` are those of `run`.
    """
    size = -(-len(image) // 2048) * 2048
    data = torch.zeros(RESULT * 4 + max(size, 16), dtype=torch.uint8)
    data[RESULT * 4 :][: len(image)] = torch.frombuffer(
        bytearray(image or b"\0"), dtype=torch.uint8
    )[: len(image)]
    fill = "".join(
        f"ld.global.v4.b32 {{{names(10, 4)}}}, [%rd2+{RESULT * 4 + at}];\n"
        f"st.shared.v4.b32 [%r5+{1024 + at}], {{{names(10, 4)}}};\n"
        for at in range(0, size, 2048)
    )
    clear = "mov.b32 %r8, 0;\n" + "".join(
        f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6+{at}], {{%r8}};\n"
        for at in range(first, first + columns)
    )
    clear += "tcgen05.wait::st.sync.aligned;\n"
    read = "".join(
        f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r8}}, [%r6+{first + at}];\n"
        "tcgen05.wait::ld.sync.aligned;\n"
        f"st.global.b32 [%rd3+{512 * at}], %r8;\n"
        for at in range(columns)
    )
    text = BEGIN.replace("FILL", fill).replace("CLEAR", clear) + body + END.replace("READ", read)
    run(text.replace(without, ""), warps=4, smem=SMEM, arch="sm_100a", data=data, **options)
    return data[: RESULT * 4].numpy().view(np.uint32).reshape(COLUMNS, 128)[:columns]


# ---- ld and st ----
# (register, lane) -> (row, column), read off CUTLASS's copy traits
CELLS = {
    ("16x64b.x2", 2): {(0, 0): (0, 0), (0, 1): (8, 0), (0, 2): (0, 1), (0, 31): (15, 1)}
    | {(1, 4): (1, 2), (1, 7): (9, 3)},
    ("16x128b.x2", 4): {(0, 0): (0, 0), (0, 3): (0, 3), (0, 4): (1, 0), (1, 0): (8, 0)}
    | {(2, 1): (0, 5), (3, 31): (15, 7)},
    ("16x256b.x2", 8): {(0, 0): (0, 0), (1, 0): (0, 1), (0, 1): (0, 2), (2, 0): (8, 0)}
    | {(3, 31): (15, 7), (4, 5): (1, 10)},
}


@pytest.mark.parametrize("half", [0, 16])
@pytest.mark.parametrize("shape", CELLS)
def test_shapes_of_st_and_ld(shape, half):
    """Register r of lane l holds 1000 r + l + 1; a load by the same shape gives it back."""
    name, count = shape
    values = "".join(
        f"and.b32 %r{20 + i}, %r2, 31;\nadd.s32 %r{20 + i}, %r{20 + i}, {1000 * i + 1};\n"
        for i in range(count)
    )
    at = f"[%r6+{half << 16}]"
    store = f"tcgen05.st.sync.aligned.{name}.b32 {at}, {{{names(20, count)}}};\n"
    body = values + store + "tcgen05.wait::st.sync.aligned;\n"
    found = execute(body)
    for (register, lane), (row, column) in CELLS[shape].items():
        for warp in range(4):
            assert found[column, 32 * warp + half + row] == 1000 * register + lane + 1
    assert np.count_nonzero(found) == 4 * 32 * count
    load = f"tcgen05.ld.sync.aligned.{name}.b32 {{{names(30, count)}}}, {at};\n"
    again = (
        f"tcgen05.st.sync.aligned.{name}.b32 [%r6+{(half << 16) + 32}], {{{names(30, count)}}};\n"
    )
    found = execute(body + load + again + "tcgen05.wait::st.sync.aligned;\n")
    assert np.array_equal(found[:32], found[32:])


def test_two_halves():
    """16x32bx2: lanes 16 .. 31 have the same rows, some columns further."""
    body = """tcgen05.st.sync.aligned.16x32bx2.x1.b32 [%r6], 5, {%r2};
tcgen05.wait::st.sync.aligned;
"""
    found = execute(body)
    assert found[0, 3] == 3 and found[5, 3] == 19 and found[5, 32] == 48
    assert np.count_nonzero(found) == 127


def test_a_warp_may_access_its_own_quarter():
    with pytest.raises(TmemFault, match="may access lanes"):
        execute("tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r20}, [%r4];")


# ---- operands ----
def image_of(codes):
    """A K-major matrix of bytes (rows, 32) without swizzle: LBO = 16 rows, SBO = 128."""
    rows = len(codes)
    image = np.zeros((2, rows // 8, 8, 16), np.uint8)
    image[:] = codes.reshape(rows // 8, 8, 2, 16).transpose(2, 0, 1, 3)
    return image.tobytes()


def descriptor(register, offset, rows):
    """PTX that puts the descriptor of such a matrix at a shared offset into a register."""
    fields = 1 << 46 | (128 >> 4) << 32 | (16 * rows >> 4) << 16
    return f"""add.s32 %r9, %r1, {1024 + offset};
shr.u32 %r9, %r9, 4;
and.b32 %r9, %r9, 16383;
cvt.u64.u32 {register}, %r9;
add.s64 {register}, {register}, {fields};
"""


def encode(generator, name, rows):
    """Random codes (rows, 32 bytes) of a format, and their values."""
    format = FORMATS[name]
    per = 32 // format.container
    if format.bits == 16:
        kind = torch.bfloat16 if name == "bf16" else torch.float16
        values = torch.from_numpy(generator.normal(size=(rows, per))).to(kind)
        return values.view(torch.uint8).numpy().reshape(rows, 32), values.double().numpy()
    if name == "tf32":
        values = generator.integers(-512, 512, (rows, per)).astype(np.float32) / 64
        return values.view(np.uint8).reshape(rows, 32), values.astype(np.float64)
    codes = generator.integers(0, 1 << format.bits, (rows, per)).astype(np.uint8)
    values = format.table[codes]
    codes = np.where(np.isfinite(values), codes, 0).astype(np.uint8)
    packed = codes
    if format.bits < 8:
        bits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., : format.bits]
        units = np.zeros((rows, 2, 128), np.uint8)
        units[..., : 16 * format.bits] = bits.reshape(rows, 2, -1)
        packed = np.packbits(units, axis=-1, bitorder="little").reshape(rows, 32)
    return packed, format.table[codes]


KINDS = {
    ("f16", "f16"): ("f16", 0, 0),
    ("bf16", "bf16"): ("f16", 1, 1),
    ("tf32", "tf32"): ("tf32", 2, 2),
    ("e4m3", "e4m3"): ("f8f6f4", 0, 0),
    ("e4m3", "e5m2"): ("f8f6f4", 0, 1),
    ("e2m3", "e3m2"): ("f8f6f4", 3, 4),
    ("e5m2", "e2m1"): ("f8f6f4", 1, 5),
    ("s8", "u8"): ("i8", 1, 0),
}


def lanes_of(m, ws, n):
    """(columns, lanes, row of each lane, first column of D's in each lane) of the layouts."""
    lane = np.arange(128)
    if ws and m < 128:
        return n * m // 128, lane, lane % m, lane // m * (n * m // 128)
    if m == 64:
        row = np.arange(64)
        return n, 32 * (row // 16) + row % 16, row, 0 * row
    return n, lane, lane, 0 * lane


def product(formats, m, n, ws="", masked=(), times=1, schedule=0):
    kind, code_a, code_b = KINDS[formats]
    generator = np.random.default_rng(m + n)
    (codes_a, a), (codes_b, b) = encode(generator, formats[0], m), encode(generator, formats[1], n)
    bits = (2 if kind == "i8" else 1) << 4 | code_a << 7 | code_b << 10
    bits |= n >> 3 << 17 | m >> 4 << 24
    disabled = "{" + ", ".join(str(word) for word in masked) + "}, " if masked else ""
    text = descriptor("%rd8", 0, m) + descriptor("%rd9", 32 * m, n) + f"mov.b32 %r9, {bits};\n"
    text += "mov.pred %p7, 1;\nmov.pred %p8, 0;\n" if times > 1 else "mov.pred %p8, 0;\n"
    for index in range(times):
        flag = "%p7" if index else "%p8"
        text += f"tcgen05.mma{ws}.cta_group::1.kind::{kind} [%r4], %rd8, %rd9, %r9, "
        text += f"{disabled}{flag};\n"
    image = image_of(codes_a) + image_of(codes_b)
    columns, lanes, row, first = lanes_of(m, bool(ws), n)
    found = execute(ISSUE.format(text), image, min(columns, COLUMNS), schedule=schedule)
    whole = times * (a @ b.T)
    at = first + np.arange(len(found))[:, None]
    return found, lanes, whole[row, at]


@pytest.mark.parametrize(
    ("m", "n", "ws"), [(128, 32, ""), (64, 24, ""), (64, 64, ".ws"), (32, 128, ".ws")]
)
@pytest.mark.parametrize("formats", KINDS, ids="-".join)
def test_products(formats, m, n, ws):
    found, lanes, right = product(formats, m, n, ws)
    kind = np.int32 if formats[0] == "s8" else np.float32
    assert np.array_equal(found[:, lanes].view(kind), right.astype(kind))
    others = np.setdiff1d(np.arange(128), lanes)
    assert not found[:, others].any()


@pytest.mark.parametrize("schedule", [0, 1])
def test_products_add_up(schedule):
    found, _, right = product(("f16", "f16"), 128, 32, times=3, schedule=schedule)
    assert np.allclose(found.view(np.float32), right, rtol=1e-6, atol=1e-6)


def test_lanes_that_are_left_out():
    found, _, right = product(("bf16", "bf16"), 128, 16, masked=(0, 1 << 5, 0, 0))
    assert not found[:, 37].any()
    kept = np.arange(128) != 37
    assert np.array_equal(found.view(np.float32)[:, kept], right.astype(np.float32)[:, kept])


@pytest.mark.parametrize(
    ("m", "n", "ws"), [(64, 264, ""), (128, 24, ""), (32, 64, ""), (64, 32, ".ws")]
)
def test_shapes_that_there_are_not(m, n, ws):
    with pytest.raises(DescriptorFault, match=f"M = {m}"):
        product(("f16", "f16"), m, n, ws)


# ---- cp ----
def test_cp():
    words = np.arange(1, 1025, dtype=np.uint32).reshape(128, 8)
    body = descriptor("%rd8", 0, 128) + "tcgen05.cp.cta_group::1.128x256b [%r4], %rd8;\n"
    found = execute(ISSUE.format(body), image_of(words.view(np.uint8)))
    assert np.array_equal(found[:8], words.T) and not found[8:].any()


@pytest.mark.parametrize(
    ("shape", "lanes"),
    [
        ("32x128b.warpx4", lambda lane: lane % 32),
        ("64x128b.warpx2::02_13", lambda lane: lane % 64),
        ("64x128b.warpx2::01_23", lambda lane: lane // 64 * 32 + lane % 32),
    ],
)
def test_cp_to_several_places(shape, lanes):
    words = np.arange(1, 513, dtype=np.uint32).reshape(64, 8)
    body = descriptor("%rd8", 0, 64) + f"tcgen05.cp.cta_group::1.{shape} [%r4], %rd8;\n"
    found = execute(ISSUE.format(body), image_of(words.view(np.uint8)))
    assert np.array_equal(found[:4].T, words[lanes(np.arange(128)), :4])


def test_cp_is_over_when_its_commit_is():
    body = descriptor("%rd8", 0, 128) + "tcgen05.cp.cta_group::1.128x256b [%r4], %rd8;\n"
    early = body + "$issued:\n"
    with pytest.raises(Race, match="tcgen05.cp"):
        text = "setp.ne.b32 %p3, %r2, 0;\n@%p3 bra $issued;\n" + early
        execute(text, bytes(4096), columns=8)


# ---- operands in shared memory ----
PRODUCT = (
    descriptor("%rd8", 0, 128)
    + descriptor("%rd9", 0, 16)
    + f"mov.b32 %r9, {1 << 4 | 16 >> 3 << 17 | 128 >> 4 << 24};\nmov.pred %p8, 0;\n"
    + "tcgen05.mma.cta_group::1.kind::f16 [%r4], %rd8, %rd9, %r9, %p8;\n"
)
OVERWRITE = "mov.b32 %r10, 0;\nst.shared.b32 [%r5+1024], %r10;\n"


@pytest.mark.parametrize("schedule", range(4))
def test_operands_that_no_fence_makes_visible(schedule):
    fence = "fence.proxy.async.shared::cta;"
    execute(ISSUE.format(PRODUCT), bytes(range(1, 65)) * 64, schedule=schedule)
    with pytest.raises(Race, match="no fence.proxy.async"):
        execute(ISSUE.format(PRODUCT), bytes(4096), schedule=schedule, without=fence)


@pytest.mark.parametrize("schedule", range(4))
def test_operands_overwritten_before_the_commit_is_seen(schedule):
    image = bytes(range(1, 65)) * 64
    execute(ISSUE.format(PRODUCT) + OVERWRITE, image, schedule=schedule)
    with pytest.raises(Race):  # of the product or of the store, whichever comes second
        body = ISSUE.format(PRODUCT).replace("$issued:", "$issued:\n" + OVERWRITE)
        execute(body, image, schedule=schedule)


def test_operands_behind_shared_memory():
    body = PRODUCT.replace(descriptor("%rd9", 0, 16), descriptor("%rd9", SMEM, 16))
    with pytest.raises(OutOfBounds, match="an operand of a tcgen05.mma"):
        execute(ISSUE.format(body), bytes(4096))


# ---- what a session may ask for ----
@pytest.mark.parametrize(
    "missing", ["fence::before_thread_sync", "fence::after_thread_sync", "wait::ld.sync.aligned"]
)
def test_fences_and_waits_that_cards_do_without(missing):
    body, image = ISSUE.format(PRODUCT), bytes(range(1, 65)) * 64
    right = execute(body, image, strict="fences")
    missing = f"tcgen05.{missing};\n"
    assert (execute(body, image, without=missing) == right).all()
    with pytest.raises(Race, match=r"no tcgen05.fence::|wait::ld"):
        execute(body, image, without=missing, strict="fences")
