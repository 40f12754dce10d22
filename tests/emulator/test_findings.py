"""Each kind of fault, in a program of a few lines, is found and named; its repair runs."""

import pytest

from ptx_emulator.findings import (
    BarrierFault,
    Deadlock,
    LaunchFault,
    Misaligned,
    OutOfBounds,
    Race,
    UndefinedRead,
    UnknownInstruction,
)

from .programs import run

INIT = """setp.ne.b32 %p1, %r2, 0;
@%p1 bra $ready;
mbarrier.init.shared.b64 [%r1], COUNT;
fence.mbarrier_init.release.cluster;
$ready:
bar.sync 0;
"""
WAIT = """$wait{0}:
mbarrier.try_wait.parity.shared.b64 %p2, [%r1], {1};
@%p2 bra $over{0};
bra $wait{0};
$over{0}:
"""
# Warp 0 writes a word, warp 1 reads it.
WRITE = "setp.ne.b32 %p3, %r3, 0;\n@%p3 bra $reader;\nst.shared.b32 [%r1+64], %r2;\n"
READ = "setp.ne.b32 %p4, %r3, 1;\n@%p4 bra $end;\nld.shared.b32 %r9, [%r1+64];\n$end:\n"
# Thread 0 copies 128 bytes of the tensor to shared memory.
LOAD = """setp.ne.b32 %p5, %r2, 0;
@%p5 bra $issued{0};
mbarrier.arrive.expect_tx.shared.b64 %rd9, [%r1], BYTES;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+128], [%rd1], 128, [%r1];
$issued{0}:
"""
# Thread 0 stores 128 bytes that all of its warp wrote.
FILL = "shl.b32 %r5, %r2, 2;\nadd.s32 %r6, %r1, %r5;\nst.shared.b32 [%r6+128], %r2;\n"
STORE = """setp.ne.b32 %p6, %r2, 0;
@%p6 bra $stored;
cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1+128], 128;
cp.async.bulk.commit_group;
DRAIN
$stored:
"""
COPY = FILL + "cp.async.ca.shared.global [%r6+512], [%rd1], 4;\ncp.async.commit_group;\n"
FENCE = "fence.proxy.async.shared::cta;\n"
DRAIN = "cp.async.bulk.wait_group.read 0;"


def init(count):
    return INIT.replace("COUNT", str(count))


def load(label="", nbytes=128):
    return LOAD.replace("{0}", label).replace("BYTES", str(nbytes))


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("ld.shared.b32 %r9, [%r1+5000];", OutOfBounds, "shared offset"),
        ("st.shared.b32 [%r1+-4096], %r2;", OutOfBounds, "shared offset"),
        ("ld.global.b32 %r9, [%rd1+1024];", OutOfBounds, "0x400 bytes into a tensor of 0x400"),
        ("st.global.b32 [%rd1+-4], %r2;", OutOfBounds, "global address"),
        ("ld.shared.b32 %r9, [%r1+2];", Misaligned, "4 bytes"),
        ("ld.global.v4.b32 {%r9, %r10, %r11, %r12}, [%rd1+8];", Misaligned, "16 bytes"),
        ("ld.shared.b32 %r9, [%r1+64];", UndefinedRead, "nothing wrote"),
        (
            "setp.eq.b32 %p1, %r2, 99;\n@!%p1 bra $skip;\nmov.b32 %r9, 1;\n$skip:\n"
            "st.global.b32 [%rd1], %r9;",
            UndefinedRead,
            "%r9",
        ),
        (init(33) + "mbarrier.arrive.shared.b64 %rd9, [%r1];\n" + WAIT.format("", 0), Deadlock, ""),
        (
            init(31) + "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 64;\n"
            "mbarrier.arrive.shared.b64 %rd9, [%r1];",
            BarrierFault,
            "more than its count of 31",
        ),
        (
            init(31) + "mbarrier.arrive.shared.b64 %rd9, [%r1];",
            BarrierFault,
            "1 of the 32 lanes",
        ),
        ("mbarrier.arrive.shared.b64 %rd9, [%r1];", BarrierFault, "no mbarrier was initialised"),
        ("mbarrier.init.shared.b64 [%r1+4], 1;", BarrierFault, "mbarrier.init"),
        (
            init(1).replace("fence.mbarrier_init.release.cluster;", "") + load(),
            BarrierFault,
            "no fence.mbarrier_init",
        ),
        ("bar.sync 0, 64;", Deadlock, "bar 0 (32 of 64 threads arrived)"),
        ("bar.sync 1, 48;", BarrierFault, "multiple of 32"),
        ("frobnicate.b32 %r9, %r2;", UnknownInstruction, "frobnicate"),
    ],
)
def test_faults(body, error, says):
    with pytest.raises(error) as caught:
        run(body)
    assert says in str(caught.value)


def test_deadlock_names_who_waits_on_what():
    body = init(2) + "setp.eq.b32 %p3, %r2, 0;\n@%p3 mbarrier.arrive.shared.b64 %rd9, [%r1];\n"
    with pytest.raises(Deadlock) as caught:
        run(body + WAIT.format("", 0), warps=2)
    text = str(caught.value)
    assert "warps 0-1" in text and "parity 0" in text and "1 of 2 arrivals" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"smem": 99 * 1024 + 1}, "101376"),
        ({"warps": 33}, "1056 threads"),
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "no multiple of cluster"),
    ],
)
def test_launches_beyond_the_card(options, says):
    with pytest.raises(LaunchFault, match=says):
        run("", **options)


RACES = {
    "a write read by another warp": (
        WRITE + "$reader:\n" + READ,
        WRITE + "$reader:\nbar.sync 0;\n" + READ,
    ),
    "a copy that is not waited for": (
        init(1) + load() + "ld.shared.b32 %r9, [%r1+128];",
        init(1) + load() + WAIT.format("", 0) + "ld.shared.b32 %r9, [%r1+128];",
    ),
    "a refill of what is being read": (
        init(1) + load() + WAIT.format("a", 0) + "ld.shared.b32 %r9, [%r1+128];\n" + load("b"),
        init(1)
        + load()
        + WAIT.format("a", 0)
        + "ld.shared.b32 %r9, [%r1+128];\nbar.sync 0;\n"
        + load("b"),
    ),
    "a bulk store of unfenced writes": (
        FILL + STORE.replace("DRAIN", DRAIN),
        FILL + FENCE + STORE.replace("DRAIN", DRAIN),
    ),
    "a bulk store of writes behind the fence": (
        FILL + FENCE + FILL.replace(", %r2;", ", %r3;") + STORE.replace("DRAIN", DRAIN),
        FILL + FENCE + FILL.replace(", %r2;", ", %r3;") + FENCE + STORE.replace("DRAIN", DRAIN),
    ),
    "a write into the source of a bulk store": (
        FILL + FENCE + STORE.replace("DRAIN", "") + FILL.replace(", %r2;", ", %r3;") + DRAIN,
        FILL + FENCE + STORE.replace("DRAIN", DRAIN) + FILL.replace(", %r2;", ", %r3;"),
    ),
    "a cp.async that is not waited for": (
        COPY + "ld.shared.b32 %r9, [%r6+512];",
        COPY + "cp.async.wait_group 0;\nld.shared.b32 %r9, [%r6+512];",
    ),
    "an mbarrier used before others know of it": (
        init(64).replace("bar.sync 0;", "") + "mbarrier.arrive.shared.b64 %rd9, [%r1];",
        init(64) + "mbarrier.arrive.shared.b64 %rd9, [%r1];",
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_races(name):
    """The fault is found whatever the order; with the missing part in place nothing is."""
    faulty, repaired = RACES[name]
    for schedule in range(4):
        with pytest.raises(Race):
            run(faulty, warps=2, schedule=schedule)
        run(repaired, warps=2, schedule=schedule)


def test_a_phase_tells_of_those_who_end_it():
    """Not of a warp that arrives behind its end, even if by the same instruction as the others."""
    reads = "".join(f"ld.shared.b32 %r9, [%r1+{at}];\n" for at in (128, 256, 384))
    arrive = "mbarrier.arrive.shared.b64 %rd9, [%r1];\n"
    refill = FILL.replace(", %r2;", ", %r3;")
    body = reads + arrive + WAIT.format("", 0) + refill
    for schedule in range(4):
        with pytest.raises(Race):
            run(FILL + init(64) + body, warps=3, schedule=schedule)
        run(FILL + init(96) + body, warps=3, schedule=schedule)


@pytest.mark.parametrize("missing", ["", DRAIN.replace("0", "1")])
def test_bulk_stores_outlive_nobody(missing):
    """A warp waits for its stores before it ends, if the session asks for it."""
    store = FILL + FENCE + STORE
    for schedule in range(4):
        with pytest.raises(Race, match="warp 0 ends before its bulk store"):
            run(store.replace("DRAIN", missing), warps=2, schedule=schedule, strict="fences")
        run(store.replace("DRAIN", missing), warps=2, schedule=schedule)
        for wait in (DRAIN, DRAIN.replace(".read", "")):
            run(store.replace("DRAIN", wait), warps=2, schedule=schedule, strict="fences")


def test_equal_writes_are_no_race():
    """Warps may write the same value to the same place without an order between them."""
    run("mov.b32 %r9, 0;\nst.shared.b32 [%r1+64], %r9;\nld.shared.b32 %r10, [%r1+64];", warps=4)


def test_registers_that_nothing_wrote():
    """Kernels may skip loads of rows that they never use, and compute with what is there."""
    skipped = "setp.eq.b32 %p1, %r2, 99;\n@!%p1 bra $skip;\nmov.b32 %r9, 1;\n$skip:\n"
    store = "st.global.b32 [%rd1], %r9;"
    with pytest.raises(UndefinedRead, match="%r9"):
        run(skipped + store)
    assert run(skipped + store, strict=False)[0] == -1
