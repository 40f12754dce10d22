"""Programs that copy, and keep shared memory: cp.async, bulk copies, TMA boxes in each swizzle."""

import itertools

import numpy as np

from .programs import Map, Program, add, integers

# Thread 0 initialises an mbarrier at offset 0. Data is from 1024 on; at first it is 0xCDCDCDCD.
START = """setp.ne.b32 %p1, %r2, 0;
@%p1 bra $ready;
mbarrier.init.shared.b64 [%r1], 1;
fence.mbarrier_init.release.cluster;
$ready:
mov.b32 %r40, 0xCDCDCDCD;
shl.b32 %r41, %r2, 2;
add.s32 %r41, %r41, %r1;
"""
WAIT = """$wait:
mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
@!%p2 bra $wait;
"""


def cleared(nbytes: int, threads: int = 128) -> str:
    text = START
    for at in range(0, nbytes, 4 * threads):
        text += f"st.shared.b32 [%r41+{1024 + at}], %r40;\n"
    return text + "fence.proxy.async.shared::cta;\nbar.sync 0;\n"


def dump(nbytes: int, threads: int = 128) -> str:
    text = "bar.sync 0;\n"
    for at in range(0, nbytes, 4 * threads):
        text += f"ld.shared.b32 %r42, [%r41+{1024 + at}];\nst.global.b32 [%rd5+{at}], %r42;\n"
    return text


def by_first(text: str, label: str) -> str:
    """Only thread 0 does it."""
    return f"setp.ne.b32 %p3, %r2, 0;\n@%p3 bra ${label};\n{text}${label}:\n"


def cp_async() -> None:
    """Sizes and the number of bytes that are copied rather than cleared."""
    for size in (4, 8, 16):
        mode = "cg" if size == 16 else "ca"
        text = cleared(2048)
        text += f"mul.lo.u32 %r43, %r2, {size};\nadd.s32 %r43, %r43, %r1;\n"
        text += f"mul.wide.u32 %rd10, %r2, {size};\n"
        text += (
            f"add.s64 %rd10, %rd10, %rd1;\nand.b32 %r44, %r2, 31;\nmin.u32 %r44, %r44, {size};\n"
        )
        text += f"cp.async.{mode}.shared.global [%r43+1024], [%rd10], {size}, %r44;\n"
        text += "cp.async.commit_group;\ncp.async.wait_group 0;\n" + dump(2048)
        add(f"cp.async {size}", Program(text, integers(60, 512), 512, threads=128, smem=4096))


def flat() -> None:
    load = "mbarrier.arrive.expect_tx.shared.b64 %rd10, [%r1], 1040;\n"
    name = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    load += f"{name} [%r1+1040], [%rd1+32], 1024, [%r1];\n{name} [%r1+2512], [%rd1], 16, [%r1];\n"
    text = cleared(2048) + by_first(load, "issued") + WAIT + dump(2048)
    add("cp.async.bulk load", Program(text, integers(61, 512), 512, threads=128, smem=4096))
    fill = "".join(
        f"ld.global.b32 %r42, [%rd4+{at}];\nst.shared.b32 [%r41+{1024 + at}], %r42;\n"
        for at in (0, 512)
    )
    store = "cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r1+1040], 512;\n"
    store += "cp.async.bulk.global.shared::cta.bulk_group [%rd2+1024], [%r1+1024], 16;\n"
    store += "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
    text = cleared(1024) + fill + "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    add(
        "cp.async.bulk store",
        Program(text + by_first(store, "stored"), integers(62, 256), 512, threads=128, smem=4096),
    )


def reductions() -> None:
    """All 32 lanes of a warp let the same 512 bytes be added to what is in the target."""
    fill = ""
    for part in (0, 512):
        fill += f"ld.global.b32 %r42, [%rd4+{part}];\nst.shared.b32 [%r41+{1024 + part}], %r42;\n"
        fill += f"mov.b32 %r43, 0x3F800000;\nst.global.b32 [%rd5+{part}], %r43;\n"
    fill += "fence.proxy.async;\nbar.sync 0;\n"
    reduce = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2], [%r1+1040], 512;\n"
    reduce += "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
    words = (np.arange(256) / 8).astype(np.float32).view(np.uint32)
    for lanes in (1, 32):
        text = f"setp.ge.u32 %p4, %r2, {lanes};\n@%p4 bra $reduced;\n{reduce}$reduced:\n"
        text = cleared(1024) + fill + text
        name = f"cp.reduce.async.bulk by {lanes} lanes"
        add(name, Program(text, words, 256, threads=128, smem=4096))


# ---- TMA ----
ROWS, INNER = 40, 64  # of a matrix of 16-bit elements whose values are their positions
SPAN = {0: 64, 1: 16, 2: 32, 3: 64}  # elements of a box row: the swizzle's span
MATRIX = np.arange(ROWS * INNER, dtype=np.uint32).astype(np.uint16).view(np.uint32)


def boxes(
    name: str, map_: Map, places: list[tuple[int, tuple[int, ...]]], size: int = 4096
) -> None:
    """Load the boxes at the coordinates to shared offsets (from 1024), and keep all of it."""
    nbytes = 2 * int(np.prod(map_.box)) * len(places)
    load = f"mbarrier.arrive.expect_tx.shared.b64 %rd10, [%r1], {nbytes};\nmov.b64 %rd11, map;\n"
    load += "cvta.param.u64 %rd11, %rd11;\n"
    kind = f"cp.async.bulk.tensor.{len(map_.dims)}d.shared::cluster.global.tile"
    kind += ".mbarrier::complete_tx::bytes"
    for offset, coords in places:
        at = ", ".join(map(str, coords))
        load += f"{kind} [%r1+{1024 + offset}], [%rd11, {{{at}}}], [%r1];\n"
    text = cleared(size) + by_first(load, "issued") + WAIT + dump(size)
    add(
        f"TMA load {name}",
        Program(text, MATRIX, size // 4, threads=128, smem=1024 + size, map=map_),
    )


def matrix(swizzle: int, rows: int, inner: int | None = None, **options: bool) -> Map:
    return Map((INNER, ROWS), (2 * INNER,), (inner or SPAN[swizzle], rows), swizzle, **options)


def loads() -> None:
    for swizzle in range(4):
        span = SPAN[swizzle]
        row = 2 * span
        step = max(row, 128)
        boxes(f"swizzle {swizzle}", matrix(swizzle, 16), [(0, (0, 3)), (2048, (INNER - span, 20))])
        boxes(
            f"swizzle {swizzle}, rows inside an atom",
            matrix(swizzle, 5),
            [(128, (0, 1)), (1664, (0, 9))],
        )
        one = [(step * i, (0, 2 * i + 1)) for i in range(16)]
        boxes(f"swizzle {swizzle}, single rows", matrix(swizzle, 1), one)
        two = [
            (2048 * (i % 2) + max(2 * row, 128) * (i // 2) + 128 * (i % 2), (0, 3 * i))
            for i in range(6)
        ]
        boxes(f"swizzle {swizzle}, pairs of rows", matrix(swizzle, 2), two)
        boxes(
            f"swizzle {swizzle}, outside",
            matrix(swizzle, 8),
            [(0, (-8, -3)), (1024, (INNER - 8, ROWS - 3)), (2048, (0, 500))],
        )
        boxes(
            f"swizzle {swizzle}, outside is NaN",
            matrix(swizzle, 8, nan_fill=True),
            [(0, (-8, -3)), (1024, (INNER - 8, ROWS - 3))],
        )
        if swizzle:
            boxes(
                f"swizzle {swizzle}, half as wide",
                matrix(swizzle, 8, span // 2),
                [(0, (0, 0)), (1024, (8, 8)), (2176, (0, 9))],
            )
    narrow = Map((32, 5, 8), (64, 320), (16, 3, 2), 2)
    places = [(0, (0, 0, 0)), (512, (16, 3, 7)), (1024, (8, -1, 4))]
    boxes("rank 3, half as wide", narrow, places)
    solid = Map((32, 5, 8), (64, 320), (32, 2, 3), 2)
    boxes("rank 3", solid, [(0, (0, 0, 0)), (512, (0, 4, 5)), (1024, (16, -1, 7))])
    pages = Map((32, 4, 2, 5), (128, 64, 512), (32, 4, 1, 2), 2)
    boxes("rank 4", pages, [(0, (0, 0, 1, 0)), (512, (0, 2, 0, 4)), (1024, (0, 0, 1, 2))])


STORES = {  # (shared offset, coordinates)
    "inside": (0, "0, 2"),
    "from another row": (384, "0, 9"),
    "past the end": (1024, f"{INNER - 16}, {ROWS - 3}"),
    "before the start": (512, "0, -2"),
}


def stores() -> None:
    """Shared memory holds positions, and a box of it is stored through a map over the target."""
    for swizzle, (name, (offset, at)) in itertools.product((0, 2, 3), STORES.items()):
        fill = cleared(2048)
        for part in range(0, 2048, 512):
            fill += (
                f"ld.global.b32 %r42, [%rd4+{part}];\nst.shared.b32 [%r41+{1024 + part}], %r42;\n"
            )
        fill += "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
        store = "mov.b64 %rd11, map;\ncvta.param.u64 %rd11, %rd11;\n"
        column, row = at.split(", ")
        store += f"mov.b32 %r43, {column};\nmov.b32 %r44, {row};\n"
        store += "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group "
        store += f"[%rd11, {{%r43, %r44}}], [%r1+{1024 + offset}];\n"
        store += "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
        map_ = Map((INNER, ROWS), (2 * INNER,), (SPAN[swizzle], 4), swizzle, over_target=True)
        add(
            f"TMA store swizzle {swizzle}, {name}",
            Program(
                fill + by_first(store, "stored"),
                MATRIX,
                len(MATRIX),
                threads=128,
                smem=4096,
                map=map_,
            ),
        )


# ---- clusters of two CTAs ----
TOGETHER = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"


def clusters() -> None:
    """CTA 0 loads boxes for both; then each CTA writes into the other one's shared memory."""
    nbytes, size = 1024, 2048
    kind = "cp.async.bulk.tensor.2d.shared::cluster.global.tile"
    kind += ".mbarrier::complete_tx::bytes.multicast::cluster"
    apart = f"mul.wide.u32 %rd9, %r3, {size - 512};\nadd.s64 %rd5, %rd5, %rd9;\n"
    expect = f"mbarrier.arrive.expect_tx.shared.b64 %rd10, [%r1], {nbytes};\n"
    load = "setp.ne.b32 %p4, %r3, 0;\n@%p4 bra $expected;\n"
    load += "mov.b64 %rd11, map;\ncvta.param.u64 %rd11, %rd11;\nmov.b16 %h1, 3;\n"
    for offset, row in ((0, 2), (1536, 11)):
        load += f"{kind} [%r1+{1024 + offset}], [%rd11, {{0, {row}}}], [%r1], %h1;\n"
    load += "$expected:\n"
    begin = apart + cleared(size) + by_first(expect, "told") + TOGETHER
    text = begin + by_first(load, "issued") + WAIT + dump(size) + TOGETHER
    options = {"threads": 128, "blocks": 2, "smem": 1024 + size, "cluster": 2}
    words = 2 * size // 4
    add("TMA multicast", Program(text, MATRIX, words, map=matrix(3, 4), **options))
    text = apart + cleared(size) + TOGETHER
    text += "mov.u32 %r60, %cluster_ctarank;\nxor.b32 %r60, %r60, 1;\n"
    text += (
        "mapa.shared::cluster.u32 %r61, %r41, %r60;\nmapa.shared::cluster.u32 %r62, %r1, %r60;\n"
    )
    text += "ld.global.b32 %r63, [%rd4];\nst.shared::cluster.b32 [%r61+1536], %r63;\n"
    remote = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r62];\n"
    text += TOGETHER + by_first(remote, "arrived") + WAIT
    text += "ld.shared::cluster.b32 %r64, [%r61+1536];\nst.shared.b32 [%r41+1024], %r64;\n"
    add(
        "distributed shared memory", Program(text + dump(size) + TOGETHER, MATRIX, words, **options)
    )


cp_async()
flat()
clusters()
reductions()
loads()
stores()
