"""Races in global memory: between CTAs of a launch, and with the launch before."""

import pytest
import torch

import ptx_emulator
from ptx_emulator.findings import Race
from ptx_emulator.launch.host import Launch

from .programs import HEADER, PROLOGUE, run

# CTA 0 writes word 32 + lane and raises the flag, word 0; CTA 1 looks at the flag, then reads.
BODY = """mov.u32 %r4, %ctaid.x;
shl.b32 %r5, %r2, 2;
cvt.u64.u32 %rd2, %r5;
add.s64 %rd2, %rd1, %rd2;
mov.b32 %r8, 1;
setp.ne.b32 %p1, %r4, 0;
@%p1 bra $reader;
st.global.b32 [%rd2+128], %r8;
bar.sync 0;
FENCE
RAISE
bra $end;
$reader:
LOOK
ld.global.b32 %r9, [%rd2+128];
$end:
"""
LOOK = """$again:
ld.acquire.gpu.global.b32 %r9, [%rd1];
setp.eq.b32 %p2, %r9, 0;
@%p2 bra $again;
"""
FENCE = "fence.acq_rel.gpu;"
ATOMIC = "red.global.add.u32 [%rd1], %r8;"
RELAXED = "st.relaxed.gpu.global.b32 [%rd1], %r8;"
RELEASE = "st.release.gpu.global.b32 [%rd1], %r8;"


def body(fence="", flag="", look=""):
    return BODY.replace("FENCE", fence).replace("RAISE", flag).replace("LOOK", look)


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "text", [body(), body(FENCE), body("", ATOMIC, LOOK), body("", RELAXED, LOOK)]
)
def test_reading_what_another_cta_writes(text, schedule):
    with pytest.raises(Race, match="global memory"):
        run(text, grid=(2, 1, 1), schedule=schedule)


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "text", [body(FENCE, ATOMIC, LOOK), body(FENCE, RELAXED, LOOK), body("", RELEASE, LOOK)]
)
def test_a_flag_orders_the_two(text, schedule):
    run(text, grid=(2, 1, 1), schedule=schedule)


WRITES = """mov.u32 %r4, %ctaid.x;
shl.b32 %r5, %r2, 2;
cvt.u64.u32 %rd2, %r5;
add.s64 %rd2, %rd1, %rd2;
st.global.b32 [%rd2+128], {0};
"""


def test_two_ctas_write_a_word():
    with pytest.raises(Race, match="overwrites"):
        run(WRITES.format("%r4"), grid=(3, 1, 1))
    run(WRITES.format("%r2"), grid=(3, 1, 1))  # all the same


def launches(second, overlaps):
    """A launch that writes words, and one behind it; the tensor."""
    data = torch.zeros(256, dtype=torch.int32)
    attribute = (6, (1).to_bytes(4, "little") + bytes(60))
    with ptx_emulator.session("sm_120a", strict=True) as emulator:
        emulator.allocations.add_tensor(data)
        for text, attributes in ((WRITES.format("%r2"), ()), (second, (attribute,) * overlaps)):
            launch = Launch(
                kernel="program",
                ptx=HEADER.replace("DIRECTIVES", "") + PROLOGUE + text + "\nret;\n}\n",
                grid=(1, 1, 1),
                block=(32, 1, 1),
                cluster=(1, 1, 1),
                dynamic_smem=1024,
                static_smem=0,
                stream=0,
                params=(data.data_ptr().to_bytes(8, "little"),),
                attributes=attributes,
            )
            emulator.launch(launch)


GRID_WAIT = "griddepcontrol.wait;\n"
READS = "ld.global.b32 %r9, [%rd1+{0}];\n"


def test_reading_before_griddepcontrol_wait():
    with pytest.raises(Race, match="without griddepcontrol.wait"):
        launches(READS.format(132), True)
    with pytest.raises(Race, match="without griddepcontrol.wait"):
        launches(WRITES.format("%r3") + GRID_WAIT, True)
    launches(READS.format(0) + GRID_WAIT + READS.format(132), True)
    launches(READS.format(132), False)
