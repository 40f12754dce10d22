"""Seeded faults in our kernel: each kind that the emulator catches today stays caught."""

import functools

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli import ours
from ptx_emulator.cli.case import Case, judge, make_inputs
from ptx_emulator.mutation import KINDS, Fault, faults, planted, verdict

ARCH = "sm_120a"
SCHEDULES = (0, 1, 2, 3)
# Enough keys that the ring of K and V blocks turns more than once; the varlen kernel clears rows
# of V through the generic proxy, so that it has a fence.
QUESTION = Case(
    dtype=torch.float16,
    batch=2,
    heads=1,
    kv_heads=1,
    seqlen_q=70,
    seqlen_k=600,
    head_dim=64,
    head_dim_v=64,
    varlen=True,
    seed=1,
)


@functools.cache
def ptx() -> str:
    """The text of the kernel for QUESTION, compiled and found right."""
    with ptx_emulator.session(ARCH, strict=True) as emulator:
        before = set(emulator.host.ptx_of)
        assert right(emulator)
        (digest,) = set(emulator.host.ptx_of) - before
        return emulator.host.ptx_of[digest]


def right(emulator) -> bool:
    inputs = make_inputs(QUESTION)
    return judge(QUESTION, inputs, *ours.forward(emulator, QUESTION, inputs)).ok


# Faults that change nothing a program could see: a CTA computes one tile, so that nobody waits for
# Q's slot to become free again (its count, the first wait, the last arrival and its fence), and the
# second of two bar.sync orders what the first one does.
HARMLESS = {
    "dropped wait": 1,
    "dropped arrive": 1,
    "dropped proxy fence": 1,
    "dropped bar.sync": 1,
    "count too high": 1,
    "count too low": 1,
}
LEAST = 11, 60  # kinds and faults that this kernel has


def caught(fault: Fault) -> str:
    """How a fault was noticed, and by which schedule; "" if it was not."""
    for schedule in SCHEDULES:
        with ptx_emulator.session(ARCH, schedule=schedule, strict=True) as emulator:
            text = ptx()
            with planted(emulator, text, fault):
                said = verdict(lambda card=emulator: right(card))
        if said:
            return f"{said} (schedule {schedule})"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind):
    """Every fault of a kind is noticed, but for those that are harmless."""
    places = [fault for fault in faults(ptx()) if fault.kind == kind]
    if not places:
        pytest.skip("the kernel has no place for it")
    said = {fault.line + 1: caught(fault) for fault in places}
    print("\n".join(f"{kind}, line {line}: {what or 'survived'}" for line, what in said.items()))
    survivors = [line for line, what in said.items() if not what]
    assert len(survivors) <= HARMLESS.get(kind, 0), f"unnoticed at PTX lines {survivors}"


def test_there_are_enough():
    found = faults(ptx())
    assert (len({fault.kind for fault in found}), len(found)) >= LEAST
    assert len(found) >= LEAST[1]
