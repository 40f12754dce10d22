"""Kernels that are right pass 64 schedules: no finding, and the right result."""

import importlib.util
from dataclasses import replace

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli import ours, third_party
from ptx_emulator.cli.case import Case, judge, make_inputs
from ptx_emulator.machine.cards import card_of

SCHEDULES = range(64)
SMALL = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 128, "head_dim_v": 128}
PAIR = 2, 1, 1


def case(seqlen_q, seqlen_k, **changes):
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "dtype": torch.bfloat16, **SMALL}
    return Case(**sizes | changes)


# name: arch, forward, case, SMs (few: a CTA of a persistent kernel has several tiles), cluster
KERNELS = {
    "upstream, causal": ("sm_100a", third_party.forward, case(140, 200, right=0), None, None),
    "upstream, two tiles": ("sm_100a", third_party.forward, case(130, 130, batch=2), 1, None),
    "upstream, pair of CTAs": ("sm_100a", third_party.forward, case(257, 130), None, PAIR),
    "upstream, wgmma": ("sm_90a", third_party.forward, case(70, 200, right=0), None, None),
    "upstream, mma.sync": ("sm_120a", third_party.forward, case(70, 200, right=0), None, None),
    "ours": ("sm_120a", ours.forward, case(130, 200, head_dim=64, head_dim_v=64, right=0), 1, None),
    "ours, varlen": (
        "sm_120a",
        ours.forward,
        case(70, 500, head_dim=64, head_dim_v=64, right=0, varlen=True, batch=2),
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_none_in_64_schedules(name):
    arch, forward, question, num_sms, cluster = KERNELS[name]
    if forward is third_party.forward and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    inputs = make_inputs(question)
    card = card_of(arch)
    card = replace(card, num_sms=num_sms or card.num_sms)
    clusters = set()
    for schedule in SCHEDULES:
        with ptx_emulator.session(card, schedule=schedule) as emulator:
            run = emulator.host.on_launch
            emulator.host.on_launch = lambda launch, run=run: (
                clusters.add(launch.cluster),
                run(launch),
            )
            verdict = judge(question, inputs, *forward(emulator, question, inputs))
        assert verdict.ok, f"schedule {schedule}: {verdict}"
    assert cluster is None or clusters == {cluster}
