"""Accesses to tensor memory that nothing orders, found also where they do not meet in a run.

In each wrong program warps learn of a product's end through a flag in global memory, which orders
nothing, so that no operation is in flight any more when they come.
"""

import pytest

from ptx_emulator.findings import Race

from .test_tcgen05 import PRODUCT, RESULT, execute

SCHEDULES = range(1, 5)  # 0 would let who spins run for ever
IMAGE = bytes(range(1, 65)) * 72
FLAG = RESULT * 4 - 4
COLUMNS = 48
ZERO = "mov.b32 %r20, 0;\n"
READ = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%r6];\ntcgen05.wait::ld.sync.aligned;\n"
WRITE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6+AT], {%r20};\ntcgen05.wait::st.sync.aligned;\n"
COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+AT];\n"
FENCE = "tcgen05.fence::{}_thread_sync;\n"
WITH_P = (  # the same with A in tensor memory, 32 columns further
    PRODUCT.replace("[%r4], %rd8", "[%r4], [%r12]").replace("%p8, 0", "%p8, 1")
)


def at(text, where):
    return text.replace("AT", str(where))


def wait(barrier, label):
    return f"""${label}:
mbarrier.try_wait.parity.shared.b64 %p4, [%r1+{barrier}], 0;
@%p4 bra ${label}_over;
bra ${label};
${label}_over:
"""


def issue(text):
    """What one thread of warp 0 does."""
    return f"""add.s32 %r12, %r4, 32;
setp.ne.b32 %p3, %r2, 0;
@%p3 bra $issued;
{text}$issued:
"""


def by_flag(told):
    """The warps `told` ("eq" 0: the first; "ne" 0: the others) know of the end by the flag only."""
    return f"""setp.{told}.b32 %p5, %r3, 0;
@%p5 bra $spin;
{wait(8, "wait")}mov.b32 %r21, 1;
st.volatile.global.b32 [%rd1+{FLAG}], %r21;
bra $go;
$spin:
ld.volatile.global.b32 %r22, [%rd1+{FLAG}];
setp.eq.b32 %p6, %r22, 0;
@%p6 bra $spin;
$go:
"""


def run(body, schedule, strict="fences"):
    return execute(body, IMAGE, columns=COLUMNS, schedule=schedule, strict=strict)


# what follows a product, and what it does to the columns that the product uses
ACCESSES = {
    "S read before its product is committed": (PRODUCT, READ, "tcgen05.ld"),
    "P overwritten before its product is done": (WITH_P, ZERO + at(WRITE, 33), "tcgen05.st"),
    "O rescaled while a product accumulates": (WITH_P, READ + at(WRITE, 0), "tcgen05.ld"),
    "O overwritten": (WITH_P, ZERO + at(WRITE, 0), "tcgen05.st"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ACCESSES)
def test_behind_a_product(name, schedule):
    product, access, what = ACCESSES[name]
    issued = issue(product + at(COMMIT, 8))
    after = FENCE.format("after") + access
    run(issued + wait(8, "wait") + after, schedule)
    for told in ("ne", "eq"):  # the warp that issued the product is no exception
        with pytest.raises(Race, match=f"a {what} of columns .* nothing orders it after a product"):
            run(issued + by_flag(told) + after, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_commit_before(schedule):
    """A wait for the products before: whatever warp 0 has seen, the others have not."""
    init = "mbarrier.init.shared.b64 [%r1+16], 1;\nfence.mbarrier_init.release.cluster;\n"
    other = PRODUCT.replace("[%r4]", "[%r4+16]")
    both = PRODUCT + at(COMMIT, 16) + other + at(COMMIT, 8)
    start = issue(init + both) + FENCE.format("before") + "bar.sync 0;\n"
    after = FENCE.format("after") + READ.replace("[%r6]", "[%r6+AT]")
    seen = by_flag("ne") + wait(16, "again")
    end = wait(8, "last") + FENCE.format("after")
    run(start + seen + at(after, 0) + end, schedule)
    with pytest.raises(Race, match="nothing orders it after a product"):
        run(start + seen + at(after, 16) + end, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("missing", ["wait::st", "wait::ld"])
def test_waits(missing, schedule):
    """Another warp's product comes behind a barrier, but the wait before that is missing."""
    access = ZERO + at(WRITE, 33) if missing == "wait::st" else READ
    sync = FENCE.format("before") + "bar.sync 0;\n" + FENCE.format("after")
    body = access + sync + issue(WITH_P + at(COMMIT, 8)) + wait(8, "wait") + FENCE.format("after")
    run(body, schedule)
    body = body.replace(f"tcgen05.{missing}.sync.aligned;\n", "")
    with pytest.raises(Race, match=f"tcgen05.{missing[-2:]}"):
        run(body, schedule)


@pytest.mark.parametrize("schedule", range(8))
def test_fences_on_the_wrong_side(schedule):
    """A fence behind the barrier, or in front of it, whether or not that comes in time."""
    before, after, barrier = FENCE.format("before"), FENCE.format("after"), "bar.sync 0;\n"
    end = issue(WITH_P + at(COMMIT, 8)) + wait(8, "wait") + after
    run(READ + before + barrier + after + end, schedule)
    for wrong in (barrier + before + after, after + before + barrier):
        with pytest.raises(Race, match="tcgen05.mma's D .* orders it after|no tcgen05.fence"):
            run(READ + wrong + end, schedule)


def test_loads_without_a_wait():
    """Cards seem to do without, and sessions that ask for no fences do not look for it."""
    sync = FENCE.format("before") + "bar.sync 0;\n" + FENCE.format("after")
    body = READ + sync + issue(PRODUCT + at(COMMIT, 8)) + wait(8, "wait") + FENCE.format("after")
    run(body.replace("tcgen05.wait::ld.sync.aligned;\n", ""), 0, strict=True)
