"""Precompiled kernels run as they lie in a package; all: `python -m tests.emulator.packaged`."""

import re

import pytest

from flash_attn4_cute.build.variants import compile_all, write_variants

from .packaged import CARD_OF, Package, wanted

# One of each kind, taking turns among the targets: the full set takes too long for each commit.
SAMPLE = {
    "sm90a": "DecodeKey.*head_dim=64.*PAGED.*box_n=16, is_split=True.*sink=None",
    "sm120f": "AppendKey.*head_dim=64,.*rotary_dim=64.*paged=True",
    "sm100f": "CombineKey.*head_dim=64.*stacked=False, packed=True",
}


@pytest.mark.parametrize("target", SAMPLE)
def test_found_in_the_package_and_right(fa4, tmp_path, target):
    key, case = next(
        (key, case) for key, case in wanted(target).items() if re.search(SAMPLE[target], repr(key))
    )
    assert compile_all([key], tmp_path / "cache", 1) == 1
    assert compile_all([key], tmp_path / "cache", 1) == 0, "nothing has changed"
    (folder,) = write_variants([key], tmp_path / "cache", tmp_path / "variants")
    assert sorted(path.name for path in folder.iterdir())[-1] == "index.json"
    Package(fa4, tmp_path / "variants", tmp_path / "cache").run(key, case)


def test_every_kernel_has_a_call():
    """A small call leads to the very kernel: the plan of the call that ships it says the same."""
    for target in CARD_OF:
        assert len(wanted(target)) > 50
