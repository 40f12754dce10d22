"""A pair of CTAs on neighbouring SMs that multiply as one.

The CTA of rank 0 leads: its MMA role issues the products of both, so whatever a product waits for
arrives at the leader's mbarriers, and what tells of a product's end arrives at both CTAs'. A pair
takes one piece of work, so that both come to the same number of blocks. Neither ends before the
other has: its memory may still be read, and its mbarriers arrived at.
"""

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import tcgen05

LEADER = 0
BOTH = 0b11  # mask of the ranks that a multicast reaches


def rank(ctas: int):
    """This CTA's rank in its pair; 0 without one."""
    return 0 if ctas == 1 else cute.arch.block_idx_in_cluster()


def meet(ctas: int):
    """A barrier for all threads of a CTA, or of a pair."""
    if ctas == 1:
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def group_of(ctas: int) -> tcgen05.CtaGroup:
    """The operand `cta_group` of tcgen05 and TMA."""
    return tcgen05.CtaGroup.ONE if ctas == 1 else tcgen05.CtaGroup.TWO


def leads(ctas: int):
    """Whether this CTA issues the products."""
    return True if ctas == 1 else rank(ctas) == LEADER


def arrive(barrier: cute.Pointer, ctas: int, stored: bool):
    """One arrival, by one thread, at this CTA's mbarrier, or at the leader's.

    `stored`: what this warp has written to shared memory must be visible to the leader. Tensor
    memory needs no more than its own fences.
    """
    if ctas == 1:
        cute.arch.mbarrier_arrive(barrier)
    else:
        scope = nvvm.MemScopeKind.CLUSTER if stored else None
        cute.arch.mbarrier_arrive(barrier, LEADER, scope=scope)


def expect(barrier: cute.Pointer, num_bytes: Int32, ctas: int):
    """One arrival, by one thread, that announces bytes that TMA will add."""
    if ctas == 1:
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, num_bytes)
    else:
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, num_bytes, LEADER)


def commit(barrier: cute.Pointer, ctas: int):
    """Arrive, in both CTAs of a pair, when the products that this thread has issued are done."""
    if ctas == 1:
        tcgen05.commit(barrier)
    else:
        tcgen05.commit(barrier, BOTH, tcgen05.CtaGroup.TWO)
