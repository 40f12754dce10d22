"""Seeded faults: a sample of each kind in upstream's sm_100a kernel and in ours is noticed.

`python -m ptx_emulator.cli.faults` tries more of them.
"""

import functools
import importlib.util

import pytest

from ptx_emulator import mutation
from ptx_emulator.cli.faults import SUBJECTS, Campaign

SCHEDULES = 16
TRIED = ("upstream-sm100a", "ours-sm120a", "ours-sm120a-varlen")


@functools.cache
def campaign(name):
    if name.startswith("upstream") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    return Campaign(SUBJECTS[name])


@pytest.mark.parametrize("name", TRIED)
def test_one_of_each_kind(name):
    """At least 95 % of a sample with one fault of each kind that the kernel has a place for."""
    tried = campaign(name)
    drawn = mutation.sample(tried.faults(), 1, seed=2)
    outcomes = [tried.outcome(fault, SCHEDULES) for fault in drawn]
    outcomes = [outcome for outcome in outcomes if not outcome.idle]
    survivors = [outcome for outcome in outcomes if not outcome.noticed]
    assert len(outcomes) >= 10
    assert len(survivors) <= 0.05 * len(outcomes), survivors


@pytest.mark.parametrize("name", TRIED)
def test_places(name):
    """Enough places and kinds of faults are known in each kernel."""
    found = campaign(name).faults()
    assert len(found) >= 60 and len({fault.kind for fault in found}) >= 10
