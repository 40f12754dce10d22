"""Published bugs on the CPU and a GPU; tests/emulator has the same cases, README.md the list."""

import re
from pathlib import Path

import pytest

from . import harness, regressions

README = Path(__file__).with_name("README.md")


@pytest.mark.parametrize(("row", "case"), regressions.PARAMETERS, ids=regressions.NAMES)
def test_published_bug(fa4, device, row, case):
    harness.verify(fa4, case, device)


def test_the_list_names_tests_that_exist():
    """Every file::test of README.md is one, and every row of regressions.py stands there."""
    text = README.read_text()
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        source = (README.parent / file).read_text()
        assert re.search(rf"^def {name}\(", source, re.M), f"{file}::{name}"
    for row in regressions.ROWS:
        assert f"`{row}`" in text, row
