"""clusterlaunchcontrol: each place of the grid is taken exactly once, by whatever CTA."""

import importlib.util

import pytest
import torch

import ptx_emulator
from ptx_emulator.findings import LaunchFault, Race

from . import oracle, upstream
from .programs import run

# Count in word 16 ctaid of the tensor, then ask for another CTA's place, until there is none.
BODY = """setp.ne.b32 %p1, %r2, 0;
@%p1 bra $end;
mbarrier.init.shared.b64 [%r1], 1;
fence.mbarrier_init.release.cluster;
mov.b32 %r5, 0;
mov.u32 %r6, %ctaid.x;
$tile:
shl.b32 %r7, %r6, 2;
cvt.u64.u32 %rd2, %r7;
add.s64 %rd2, %rd1, %rd2;
mov.b32 %r8, 1;
red.global.add.u32 [%rd2], %r8;
mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r1], 16;
clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r1+16], [%r1];
WAIT
{
.reg .b128 handle;
ld.shared.b128 handle, [%r1+16];
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, handle;
clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r6, %r9, %r10, _}, handle;
}
xor.b32 %r5, %r5, 1;
@%p4 bra $tile;
MORE
$end:
"""
WAIT = """$wait:
mbarrier.try_wait.parity.shared.b64 %p3, [%r1], %r5;
@%p3 bra $over;
bra $wait;
$over:
"""
MORE = """mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r1], 16;
clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r1+16], [%r1];
"""


def body(wait=WAIT, more=""):
    return BODY.replace("WAIT", wait).replace("MORE", more)


@pytest.mark.parametrize("schedule", range(6))
def test_each_place_is_taken_once(schedule):
    counts = run(body(), grid=(200, 1, 1), schedule=schedule, arch="sm_100a")
    assert (counts[:200] == 1).all() and not counts[200:].any()


def test_an_answer_that_is_not_waited_for():
    with pytest.raises(Race):
        run(body(wait=""), grid=(3, 1, 1), arch="sm_100a")


def test_asking_after_the_last():
    with pytest.raises(LaunchFault, match="none left"):
        run(body(more=MORE), grid=(3, 1, 1), arch="sm_100a")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn-4")
@pytest.mark.parametrize("schedule", [0, 3])
def test_upstream_takes_its_tiles_this_way(schedule, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 64, generator=generator).bfloat16() for _ in range(3))
    with (
        ptx_emulator.session("sm_100a", schedule=schedule) as emulator,
        upstream.upstream_on(emulator) as module,
    ):
        monkeypatch.setattr(module.utils, "_fa_clc_enabled", True)
        out, lse = upstream.forward(module, q, k, v, causal=True)
    assert any("clusterlaunchcontrol" in ptx for ptx in emulator.host.ptx_of.values())
    oracle.check(out, lse, q, k, v, True)
