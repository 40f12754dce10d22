"""Kernels that never end: livelock, and warps that wait for registers which nobody gives back."""

import pytest

from ptx_emulator.findings import Deadlock, Livelock, RegisterFault
from ptx_emulator.machine import machine

from .programs import run

# All of CTA 0's warps, or those of warp 0, poll a flag that CTA 1, or warp 1, sets.
POLL = """$again:
ld.relaxed.gpu.global.b32 %r9, [%rd1];
setp.eq.b32 %p1, %r9, 0;
@%p1 bra $again;
"""
SET = "mov.b32 %r8, 1;\nst.relaxed.gpu.global.b32 [%rd1], %r8;\n"
BY_WARP = "setp.eq.b32 %p2, %r3, 0;\n@%p2 bra $poll;\n{0}bra $end;\n$poll:\n" + POLL + "$end:\n"
BY_CTA = "mov.u32 %r3, %ctaid.x;\n" + BY_WARP


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(machine, "LIVELOCK_BLOCKS", 50_000)


@pytest.mark.parametrize("schedule", [0, 1])
def test_livelock_names_who_spins_on_what(schedule):
    with pytest.raises(Livelock) as caught:
        run(BY_WARP.format(""), warps=2, schedule=schedule)
    text = str(caught.value)
    assert "warp 0 spins" in text and "ld.relaxed.gpu.global.b32" in text


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_a_flag_ends_the_wait_of_another_warp_or_cta(schedule):
    run(BY_WARP.format(SET), warps=2, schedule=schedule)
    run(BY_CTA.format(SET), grid=(2, 1, 1), schedule=schedule)


ROLES = "setp.eq.b32 %p1, %r3, 0;\n@%p1 bra $first;\n{0}bra $end;\n$first:\n{1}$end:\n"
LIMIT = {"directives": ".reqntid 64, 1, 1\n.maxnreg 128\n"}


def setmaxnreg(action, number):
    return f"setmaxnreg.{action}.sync.aligned.u32 {number};\n"


@pytest.mark.parametrize("schedule", range(4))
def test_registers_are_taken_when_they_are_free(schedule):
    body = ROLES.format(setmaxnreg("dec", 40), setmaxnreg("inc", 216))
    run(body, warps=2, schedule=schedule, **LIMIT)


@pytest.mark.parametrize(
    ("give", "take", "error", "says"),
    [
        (setmaxnreg("dec", 40), setmaxnreg("inc", 224), Deadlock, "setmaxnreg.inc to 224"),
        ("", setmaxnreg("inc", 136), Deadlock, "0 a thread are free"),
        (setmaxnreg("dec", 136), "", RegisterFault, "which has 128"),
        (setmaxnreg("dec", 20), "", RegisterFault, "multiple of 8"),
    ],
)
def test_registers_that_there_are_not(give, take, error, says):
    with pytest.raises(error, match=says):
        run(ROLES.format(give, take), warps=2, **LIMIT)
