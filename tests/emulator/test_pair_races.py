"""Races in the shared memory of a pair of CTAs: each one's own, and by copies into the other's."""

import pytest

from ptx_emulator.findings import Race

from .programs import run

PAIR = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
SYNC = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
FENCE = "fence.proxy.async.shared::cta;\n"

# Rank 0 writes and reads a word, into which rank 1 then copies what rank 0 waits for.
COPY = f"""mov.u32 %r5, %cluster_ctarank;
setp.ne.b32 %p1, %r2, 0;
@%p1 bra $made;
mbarrier.init.shared.b64 [%r1], 1;
fence.mbarrier_init.release.cluster;
$made:
{SYNC}st.shared.b32 [%r1+1024], %r5;
ld.shared.b32 %r6, [%r1+1024];
{FENCE}BETWEEN
@%p1 bra $end;
setp.eq.b32 %p2, %r5, 0;
@%p2 bra $zero;
mapa.shared::cluster.u32 %r7, %r1, 0;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r7+1024], [%rd1], 16, [%r7];
bra $end;
$zero:
mbarrier.arrive.expect_tx.shared.b64 %rd2, [%r1], 16;
$wait:
mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0;
@%p4 bra $over;
bra $wait;
$over:
ld.shared.b32 %r6, [%r1+1024];
$end:
{SYNC}"""


@pytest.mark.parametrize("schedule", range(4))
def test_a_copy_into_the_other_cta(schedule):
    given = {"arch": "sm_100a", "schedule": schedule, **PAIR}
    run(COPY.replace("BETWEEN", SYNC), **given)
    late = "rank 1, .* not ordered after .* rank 0|rank 0 .* not ordered after a copy"
    with pytest.raises(Race, match=late):  # of whichever comes second
        run(COPY.replace("BETWEEN", ""), **given)
    with pytest.raises(Race, match=r"no fence.proxy.async after warp 0 of rank 0's write"):
        run(COPY.replace("BETWEEN", SYNC).replace(FENCE, ""), **given)


@pytest.mark.parametrize("schedule", range(4))
def test_warps_of_either_cta(schedule):
    """Warp 1 reads what warp 0 wrote, in both CTAs; in one of them nothing orders the two."""
    body = """mov.u32 %r5, %cluster_ctarank;
setp.eq.b32 %p1, %r3, 0;
@%p1 st.shared.b32 [%r1], %r2;
bar.sync 0;
@!%p1 bra $end;
setp.eq.b32 %p2, %r5, RANK;
@%p2 st.shared.b32 [%r1+4], %r2;
$end:
SYNC
@!%p1 ld.shared.b32 %r6, [%r1+4];
"""
    given = {"arch": "sm_100a", "schedule": schedule, "warps": 2, "strict": False, **PAIR}
    for rank in (0, 1):
        text = body.replace("RANK", str(rank))
        run(text.replace("SYNC", "bar.sync 0;"), **given)
        with pytest.raises(Race, match=f"of rank {rank}"):
            run(text.replace("SYNC", ""), **given)
