"""CTAs of the tcgen05 kernel that take many pieces of work: what one leaves to the next."""

import importlib

import pytest

from ptx_emulator.cli import ours
from tests.cases import BF16, F16, Case

from .on_cards import verify

ARCHS = ("sm_100a", "sm_103a")
# Sequences without queries, without keys, without either, of one query; one of three M blocks.
HOLES = {
    "layout": "varlen",
    "seqlens_q": (0, 70, 0, 0, 270, 1, 600, 130),
    "seqlens_k": (9, 0, 0, 70, 200, 3, 520, 40),
}
# Tiles that see no key between tiles that see some: more queries than keys.
BEHIND = {"layout": "dense", "seqlens_q": (700, 700), "seqlens_k": (150, 150)}
CASES: dict[str, dict] = {
    "holes": {"d": 128, "causal": True, **HOLES},
    "holes_192": {"d": 192, "d_v": 128, "causal": True, **HOLES},
    "holes_pair": {"d": 256, "causal": True, **HOLES},
    "holes_window": {"d": 64, "window": (150, 40), **HOLES},
    "holes_full": {"d": 128, **HOLES},
    "holes_lse_sink": {"d": 96, "causal": True, "sink": True, **HOLES},
    "behind": {"d": 128, "causal": True, **BEHIND},
    "behind_pair": {"d": 256, "causal": True, **BEHIND},
    "packed": {"d": 64, "causal": True, **HOLES, "heads": 4, "heads_kv": 2, "pack_gqa": True},
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_work_follow_each_other(fa4, name, monkeypatch):
    """Two CTAs, or one pair, for all of it, also where the plan lets the card hand tiles out."""
    plan = importlib.import_module(f"{fa4.__name__}.flash_attn4_cute.plan")
    monkeypatch.setattr(plan, "UNBOUNDED", 2)
    monkeypatch.setattr(ours, "NUM_SMS", 2)
    turn = list(CASES).index(name)
    options = {"heads": 1, "heads_kv": 1, "pack_gqa": False, **CASES[name]}
    question = Case(name=name, dtype=(BF16, F16)[turn % 2], **options)
    verify(fa4, question, ARCHS[turn % 2], (0, turn + 1, turn + 20))
