"""What a card did, done again in the emulator: see tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden import agreement, all_programs, emulated, kernels, store
from tests.golden.record import digest

DATA = Path(__file__).parents[1] / "golden" / "data"
PROGRAMS = all_programs()
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="nothing was recorded on a card yet")


@pytest.fixture(scope="module")
def card():
    """Results of the card: name/what -> array."""
    return store.load(DATA / "programs.xz") | store.load(DATA / "kernels.xz")


def test_everything_was_recorded(card):
    """What has no result failed on the card, and the report says so."""
    failed = tuple(json.loads((DATA / "report.json").read_text())["errors"])
    for name in (*PROGRAMS, *kernels.CASES):
        assert f"{name}/target" in card or f"{name}/out" in card or name.startswith(failed), name


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, card):
    program = PROGRAMS[name]
    if f"{name}/target" not in card:
        pytest.skip("not recorded on a card yet")
    assert np.array_equal(digest(program.source), card[f"{name}/source"]), "another input"
    words, map_ = emulated.run(program)
    expected = card[f"{name}/target"]
    same = agreement.agree(program.rule, expected, words)
    at = np.flatnonzero(~same)[:5]
    assert same.all(), (
        f"{program.rule}: {(~same).sum()} of {same.size} differ, at {at}: the card has "
        f"{[hex(x) for x in expected.ravel()[at]]}, the emulator {[hex(x) for x in words[at]]}"
    )
    if program.map is not None:
        assert np.array_equal(np.frombuffer(map_[8:64], np.uint8), card[f"{name}/map"])
