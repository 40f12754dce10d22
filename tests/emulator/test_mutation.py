"""Seeded faults: a sample of each kind in upstream's sm_100a kernel and in ours is noticed.

`python -m ptx_emulator.cli.faults` tries more of them; its last report is kept, and
docs/emulator.md says why what survived there did.
"""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from ptx_emulator import mutation
from ptx_emulator.cli.faults import Campaign
from ptx_emulator.cli.subjects import SUBJECTS

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "results" / "2026-11-29-emulator-faults.json"
SCHEDULES = 16
TRIED = ("upstream-sm100a", "ours-sm120a", "ours-sm120a-varlen")
# Kernels that take long.
ON_RECORD = (
    *TRIED,
    "ours-sm100a",
    "ours-sm100a-pair",
    "ours-sm100a-apart",
    "ours-sm100a-varlen",
    "ours-sm120a-packed",
)


@functools.cache
def campaign(name):
    if name.startswith("upstream") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    return Campaign(SUBJECTS[name])


@pytest.mark.parametrize("name", TRIED)
def test_two_of_each_kind(name):
    """At least 95 % of a sample with two faults of each kind that the kernel has places for."""
    tried = campaign(name)
    drawn = mutation.sample(tried.faults(), 2, seed=2)
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


@pytest.mark.parametrize("name", ON_RECORD)
def test_report(name):
    """What is on record: enough faults of enough kinds, 95 % noticed, each survivor explained."""
    report = json.loads(REPORT.read_text())["subjects"][name]
    assert report["schedules"] <= SCHEDULES
    assert report["faults"] >= (50 if name.endswith("varlen") else 60)
    assert len(report["kinds"]) >= 10
    assert report["caught"] >= 0.95 * report["faults"]
    explained = explanations(name)
    for survivor in report["survivors"]:
        row = survivor["kind"], survivor["line"]
        assert row in explained, f"not explained: {row}"


def explanations(name):
    """(kind, line of the PTX) of all survivors that the rows of a subject speak of."""
    found = set()
    for row in (ROOT / "docs" / "emulator.md").read_text().splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 4 and cells[0] == name:
            kinds, lines = cells[1].split(", "), cells[2].split(", ")
            found |= {(kind, int(line)) for kind in kinds for line in lines if line.isdigit()}
    return found
