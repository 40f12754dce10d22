"""What a card did, done again in the emulator: see tests/golden."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden import agreement, all_programs, emulated, kernels, store
from tests.golden.record import digest

DATA = Path(__file__).parents[1] / "golden" / "data"
PROGRAMS = all_programs()
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="nothing was recorded on a card yet")


@pytest.fixture(scope="module")
def card():
    """Results of the card: name/what -> array."""
    return store.load(DATA / "programs.xz") | store.load(DATA / "kernels.xz")


# A store that starts before the tensor ended in CUDA_ERROR_ILLEGAL_INSTRUCTION on the H200, twice.
UNRECORDED = re.compile("TMA store .*, before the start")


def test_everything_was_recorded(card):
    for name in (*PROGRAMS, *kernels.CASES):
        recorded = f"{name}/target" in card or f"{name}/out" in card
        assert recorded or UNRECORDED.search(name), name


ORDERS = [(name, 0) for name in PROGRAMS]
ORDERS += [(name, 3) for name in PROGRAMS if re.match("TMA|wgmma [AB]|cp.async|distributed", name)]


@pytest.mark.parametrize(("name", "schedule"), ORDERS)
def test_program(name, schedule, card):
    """Also where other warps go first and copies end early."""
    program = PROGRAMS[name]
    if f"{name}/target" not in card:
        pytest.skip("not recorded on a card yet")
    assert np.array_equal(digest(program.source), card[f"{name}/source"]), "another input"
    words, map_ = emulated.run(program, schedule)
    expected = card[f"{name}/target"]
    same = agreement.agree(program.rule, expected, words)
    at = np.flatnonzero(~same)[:5]
    assert same.all(), (
        f"{program.rule}: {(~same).sum()} of {same.size} differ, at {at}: the card has "
        f"{[hex(x) for x in expected.ravel()[at]]}, the emulator {[hex(x) for x in words[at]]}"
    )
    if program.map is not None:
        assert np.array_equal(np.frombuffer(map_[8:64], np.uint8), card[f"{name}/map"])


SUMS = [name for name, p in PROGRAMS.items() if p.rule == "accumulated"]
SUMS = [name for name in SUMS if not re.search("special|f16 spread x16", name)]  # infinities


@pytest.mark.parametrize("name", SUMS)
def test_sums_in_float64(name, card):
    """Without `hardware_sums` a step's result is near the card's, measured by what is added.

    The card cuts 17 terms below 2^-25 of the largest, and the sum to fp32; here it is rounded.
    """
    program = PROGRAMS[name]
    positive = dataclasses.replace(program, source=program.source & np.uint32(0x7FFF7FFF))
    ours, added = (
        emulated.run(p, hardware_sums=False)[0].view(np.float32).astype(np.float64)
        for p in (program, positive)
    )
    theirs = card[f"{name}/target"].view(np.float32).astype(np.float64)
    steps = int(name.rpartition(" x")[2]) if " x" in name else 2 if "wgmma" in name else 1
    bound = steps * (17 * 2.0**-25 + 2.0**-23 + 2.0**-24) * 1.01 * added + steps * 2.0**-148
    finite = np.isfinite(added)
    assert finite.mean() > 0.3
    assert (np.abs(ours[finite] - theirs[finite]) <= bound[finite]).all()
    assert not np.array_equal(ours, theirs), "then this test could not fail"


# Upstream's version is pinned, so its results differ by ex2, rcp and lg2 alone, which the emulator
# rounds better than the card. Ours may be newer than what was recorded and sum in another order.
APART = {"upstream": 1, "ours": 4}  # representable values
EQUAL = {"upstream": 0.995, "ours": 0.0}  # share of elements
LSE = 2e-6


@pytest.mark.parametrize("name", kernels.CASES)
def test_kernel(name, card):
    """Bits of whole kernels: all but a few, and those by one representable value."""
    case = kernels.CASES[name]
    if case.kernel == "upstream":
        pytest.importorskip("flash_attn", reason="upstream flash-attn-4 is not installed")
    found = kernels.emulated(case)
    expected = card[f"{name}/out"]
    apart = np.abs(agreement.ordinal(expected) - agreement.ordinal(found["out"]))
    assert (apart == 0).mean() >= EQUAL[case.kernel]
    size = np.abs(expected.view(np.float16) if case.dtype == torch.float16 else wide(expected))
    # small elements are sums of large ones that cancel: there count steps of the large ones
    steps = apart * np.minimum(1.0, size / np.median(size))
    assert steps.max() <= APART[case.kernel], f"{apart.max()} apart"
    lse, exact = found["lse"], card[f"{name}/lse"]
    assert np.array_equal(np.isfinite(lse), np.isfinite(exact))
    finite = np.isfinite(exact)
    assert np.abs(lse - exact)[finite].max() <= LSE


def wide(halves):
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
