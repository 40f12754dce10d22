"""The kernels whose faults `cli.faults` looks for, and the questions that they answer meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..machine.cards import card_of
from ..session import Session, session
from . import ours, third_party
from .case import Case, Inputs, make_inputs

Forward = Callable[[Session, Case, Inputs], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A kernel and the questions that it answers while its faults are looked for.

    `also` are asked where `case` shows nothing. All have to launch one kernel.
    """

    arch: str
    case: Case
    forward: Forward
    also: tuple[Case, ...] = ()
    num_sms: int | None = None  # few, so that a CTA of a persistent kernel has several tiles
    strict: bool = True  # asks for what upstream's kernels do without

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.case, *self.also

    def session(self, schedule: int) -> Any:
        card = card_of(self.arch)
        card = replace(card, num_sms=self.num_sms or card.num_sms)
        return session(card, schedule, strict="fences" if self.strict else False)


def _case(**changes: Any) -> Case:
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 128, "head_dim_v": 128, "seed": 1}
    return Case(**{"dtype": torch.bfloat16, **sizes, **changes})


def _packed(*lengths: tuple[int, int], **changes: Any) -> Case:
    """Sequences of so many queries and keys each."""
    rows, keys = (max(column) for column in zip(*lengths, strict=True))
    sizes = {"batch": len(lengths), "seqlen_q": rows, "seqlen_k": keys}
    return _case(varlen=True, lengths=lengths, **sizes, **changes)


_PAIR = {"seqlen_q": 200, "head_dim": 256, "head_dim_v": 256}
_APART = {"head_dim": 64, "head_dim_v": 64, "right": 0}
_PACKED = {"dtype": torch.float16, "head_dim": 64, "head_dim_v": 64}
# The rings turn more than once, and where the kernel is persistent a CTA has several tiles. Tiles
# of one block are cases of their own, because further blocks hide what only those need; so are
# tiles of many and of an even number, where who waits for another block's event waits for ever.
SUBJECTS = {
    "upstream-sm100a": Subject(
        "sm_100a",
        _case(heads=2, kv_heads=2, seqlen_q=256, seqlen_k=300),
        third_party.forward,
        num_sms=1,
        strict=False,
    ),
    "upstream-sm100a-causal": Subject(
        "sm_100a",
        _case(seqlen_q=300, seqlen_k=600, right=0),
        third_party.forward,
        strict=False,
    ),
    "ours-sm100a": Subject(
        "sm_100a",
        _case(heads=2, kv_heads=2, seqlen_q=256, seqlen_k=300),
        ours.forward,
        also=(
            _case(heads=5, kv_heads=5, seqlen_q=256, seqlen_k=100),
            _case(seqlen_q=200, seqlen_k=1000),
        ),
        num_sms=1,
    ),
    "ours-sm100a-pair": Subject(
        "sm_100a",
        _case(**_PAIR, heads=2, kv_heads=2, seqlen_k=300),
        ours.forward,
        also=(
            _case(**_PAIR, heads=5, kv_heads=5, seqlen_k=100),
            _case(**_PAIR, seqlen_k=1000),
        ),
        num_sms=2,
    ),
    "ours-sm100a-varlen": Subject(
        "sm_100a",
        _case(**_PACKED, batch=3, seqlen_q=210, seqlen_k=450, varlen=True),
        ours.forward_in_turn,
        # Of one block each, but for one with more blocks than the ring has slots for. In the last,
        # a CTA goes around its ring of tiles more than once, and tiles without keys hold nobody up.
        also=(
            _packed(
                (40, 100), (130, 70), (9, 128), (0, 50), (140, 1100), (200, 1), (70, 0), **_PACKED
            ),
            _packed((130, 200), (140, 250), **_PACKED),
            _packed((130, 100), (30, 0), heads=6, kv_heads=6, **_PACKED),
        ),
    ),
    "ours-sm100a-apart": Subject(
        "sm_100a",
        _case(**_APART, heads=2, kv_heads=2, seqlen_q=256, seqlen_k=600),
        ours.forward,
        also=(
            _case(**_APART, heads=5, kv_heads=5, seqlen_q=256, seqlen_k=100),
            _case(**_APART, seqlen_q=200, seqlen_k=1000),
        ),
        num_sms=1,
    ),
    "ours-sm120a": Subject(
        "sm_120a",
        _case(heads=2, kv_heads=2, seqlen_q=150, seqlen_k=300, right=0),
        ours.forward,
        num_sms=1,
    ),
    "ours-sm120a-varlen": Subject(
        "sm_120a",
        _case(
            dtype=torch.float16,
            batch=2,
            heads=2,
            kv_heads=2,
            seqlen_q=120,
            seqlen_k=600,
            head_dim=64,
            head_dim_v=64,
            varlen=True,
        ),
        ours.forward,
    ),
    "ours-sm120a-packed": Subject(
        "sm_120a",
        _case(heads=8, kv_heads=2, seqlen_q=18, seqlen_k=600, right=0, pack_gqa=True),
        ours.forward,
    ),
}


def make_steep_inputs(case: Case) -> Inputs:
    """Inputs whose scores fall along the keys in the last head, grow in the one before, and so on.

    The running maximum then grows from block to block, whichever way a kernel goes through them,
    so that it has to rescale what it has summed. In the last head the last block is what counts
    most where a kernel begins with the last keys: what it does there with its last tile shows.
    """
    inputs = make_inputs(case)
    keys = inputs.k.shape[-3]
    steps = torch.linspace(0.25, 4.0, keys)[:, None]
    falls = torch.arange(case.kv_heads).flip(0) % 2 == 0
    inputs.k.mul_(torch.where(falls, steps.flip(0), steps)[..., None])
    return inputs
