"""Precompiled kernels run as they lie in a package; all: `python -m tests.emulator.packaged`."""

import re

import pytest
import torch

from flash_attn4_cute.build.variants import compile_all, write_variants
from flash_attn4_cute.compiler import with_target
from flash_attn4_cute.device import VARIANTS, Card
from flash_attn4_cute.plan import plan_on
from flash_attn4_cute.problem import (
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    make_mask_rule,
)

from .. import harness
from ..shipped_cases import cases, num_sms, questions
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


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_every_kernel_has_a_call(variant):
    """The small call that stands for a kernel leads to that kernel and no other."""
    capability = next(found for found, name in VARIANTS.items() if name == variant)
    expected = cases(variant)
    found = [
        small_key(case, Card(variant, capability, num_sms(key))) for key, case in expected.items()
    ]
    assert found == list(expected)
    assert {key.variant for key in expected} <= set(CARD_OF)


def test_an_h200_is_asked_for_every_kernel():
    card = Card("sm90a", (9, 0), 132)
    expected = cases("sm90a")
    found = {small_key(q, card) for key, case in expected.items() for q in questions(key, case)}
    assert found >= set(expected)


def small_key(case, card):
    """The kernel that the plan of a call names."""
    call = harness.build(case, torch.device("cpu"))
    given = {name: value for name, value in call.tensors.items() if not name.startswith("max")}
    given["page_table"] = given.pop("block_table", None)
    tensors = AttentionTensors(q=call.q, k=call.k, v=call.v, sink=call.rule.sink, **given)
    options = AttentionOptions(
        mask=make_mask_rule(case.causal, case.window),
        softcap=case.softcap,
        num_splits=case.num_splits,
        max_seqlen_q=call.tensors.get("max_seqlen_q"),
        max_seqlen_k=call.tensors.get("max_seqlen_k"),
        return_lse=case.return_lse,
    )
    return with_target(plan_on(AttentionProblem.from_tensors(tensors, options), card).key)
