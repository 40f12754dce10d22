"""`python -m ptx_emulator.cli.faults`: seeded faults in whole kernels, and which are noticed.

One JSON object comes out: for each subject and kind of fault how often it was noticed and by what
(the kind of the finding, or "wrong result"), and every fault that no schedule noticed. Only places
that the faultless run reaches are tried.
"""

import argparse
import faulthandler
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..launch.host import Launch, bootstrap
from ..machine.cards import card_of
from ..mutation import KINDS, Fault, faults, planted, sample, verdict
from ..ptx.program import load
from ..session import Session, session
from . import ours, third_party
from .case import Case, Inputs, judge, make_inputs

RUN_SECONDS = 300  # of one schedule, on a busy machine; who spins for ever is found sooner
Forward = Callable[[Session, Case, Inputs], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A kernel and the question that it answers while its faults are looked for."""

    arch: str
    case: Case
    forward: Forward
    num_sms: int | None = None  # few, so that a CTA of a persistent kernel has several tiles
    strict: bool = True  # asks for what upstream's kernels do without

    def session(self, schedule: int) -> Any:
        card = card_of(self.arch)
        card = replace(card, num_sms=self.num_sms or card.num_sms)
        return session(card, schedule, strict="fences" if self.strict else False)


def _case(**changes: Any) -> Case:
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 128, "head_dim_v": 128, "seed": 1}
    return Case(**{"dtype": torch.bfloat16, **sizes, **changes})


# The rings turn more than once, and where the kernel is persistent a CTA has several tiles.
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
        num_sms=1,
    ),
    "ours-sm100a-pair": Subject(
        "sm_100a",
        _case(heads=2, kv_heads=2, seqlen_q=200, seqlen_k=300, head_dim=256, head_dim_v=256),
        ours.forward,
        num_sms=2,
    ),
    "ours-sm100a-varlen": Subject(
        "sm_100a",
        _case(
            dtype=torch.float16,
            batch=3,
            seqlen_q=210,
            seqlen_k=450,
            head_dim=64,
            head_dim_v=64,
            varlen=True,
        ),
        ours.forward_in_turn,
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
}


def make_steep_inputs(case: Case) -> Inputs:
    """Inputs whose scores grow along the keys in odd heads, and fall in even ones.

    The running maximum then grows from block to block, whichever way a kernel goes through them,
    so that it has to rescale what it has summed.
    """
    inputs = make_inputs(case)
    keys = inputs.k.shape[-3]
    steps = torch.linspace(0.25, 4.0, keys)[:, None]
    odd = torch.arange(case.kv_heads) % 2 == 1
    inputs.k.mul_(torch.where(odd, steps, steps.flip(0))[..., None])
    return inputs


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    line: int  # of the PTX, counted from 1
    text: str  # what stands there without the fault
    noticed: str  # "" if it was not
    schedule: int  # the first that noticed it, or -1
    idle: bool = False  # it is about an mbarrier that the kernel never uses


class Campaign:
    """The faults of one subject."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.inputs = make_steep_inputs(subject.case)
        launches: list[Launch] = []
        with subject.session(0) as emulator:
            plain = emulator.host.on_launch
            assert plain is not None

            def watch(launch: Launch) -> None:
                launches.append(launch)
                plain(launch)

            emulator.host.on_launch = watch
            if not self.right(emulator):
                raise ValueError("the kernel is wrong without any fault")
        self.ptx = launches[-1].ptx
        self.text = self.ptx.split("\n")
        self.reached = load(self.ptx, launches[-1].kernel).reached_lines()

    def right(self, emulator: Session) -> bool:
        case = self.subject.case
        return judge(case, self.inputs, *self.subject.forward(emulator, case, self.inputs)).ok

    def faults(self) -> list[Fault]:
        """The faults in instructions that the faultless run executes."""
        return [fault for fault in faults(self.ptx) if self.place(fault) in self.reached]

    @staticmethod
    def place(fault: Fault) -> int:
        """The line, counted from 1, of the instruction that is faulty."""
        return (fault.extra[0] if fault.extra else fault.line) + 1

    def outcome(self, fault: Fault, schedules: int) -> Outcome:
        """Run a fault under schedules 0, 1, … until one notices it."""
        noticed = self.noticed(fault, schedules)
        line = self.place(fault)
        text = " ".join(self.text[line - 1].split())[:140]
        idle = not noticed[0] and self.names_an_unused_barrier(fault)
        return Outcome(fault.kind, line, text, *noticed, idle)

    def noticed(self, fault: Fault, schedules: int) -> tuple[str, int]:
        """What a run said, and under which schedule first; ("", -1) if none said anything."""
        for schedule in range(schedules):
            with (
                self.subject.session(schedule) as emulator,
                planted(emulator, self.ptx, fault),
            ):
                said = verdict(partial(self.right, emulator))
            if said:
                return said, schedule
        return "", -1

    def names_an_unused_barrier(self, fault: Fault) -> bool:
        """Whether an init is faulty that can go: who touches its mbarrier would miss it.

        Such a fault changes nothing that the kernel does.
        """
        if "mbarrier.init" not in self.text[fault.line]:
            return False
        return not self.noticed(Fault("dropped init", fault.line, ("",)), 1)[0]

    def report(self, outcomes: list[Outcome], schedules: int) -> dict[str, Any]:
        caught = [outcome for outcome in outcomes if outcome.noticed]
        idle = [outcome for outcome in outcomes if outcome.idle]
        kinds = {
            kind: {
                "faults": sum(o.kind == kind and not o.idle for o in outcomes),
                "noticed": dict(Counter(o.noticed for o in caught if o.kind == kind)),
            }
            for kind in KINDS
            if any(o.kind == kind for o in outcomes)
        }
        return {
            "ptx_sha256": hashlib.sha256(self.ptx.encode()).hexdigest(),
            "schedules": schedules,
            "places": len(self.faults()),
            "faults": len(outcomes) - len(idle),
            "caught": len(caught),
            "by_schedule_0": sum(o.schedule == 0 for o in caught),
            "kinds": kinds,
            "survivors": [asdict(o) for o in outcomes if not o.noticed and not o.idle],
            "in_unused_barriers": [asdict(o) for o in idle],
        }


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The report on a subject. Faults are shared out to processes that know the compiled kernel."""
    campaign = Campaign(SUBJECTS[name])
    wanted = sample(campaign.faults(), given.per_kind, given.seed)
    wanted = [fault for fault in wanted if not given.kind or fault.kind in given.kind]
    outcomes = []
    with ProcessPoolExecutor(given.jobs, get_context("fork"), _inherit, (campaign,)) as pool:
        tasks = [pool.submit(_outcome, fault, given.schedules) for fault in wanted]
        for task in tasks:
            found = task.result()
            outcomes.append(found)
            said = found.noticed or ("unused" if found.idle else "SURVIVED")
            line = f"{name} line {found.line} {found.kind}: {said} ({found.schedule})"
            print(f"{line}  {found.text}", file=sys.stderr, flush=True)
    return campaign.report(outcomes, given.schedules)


_inherited: list[Campaign] = []


def _inherit(campaign: Campaign) -> None:
    _inherited.append(campaign)


def _outcome(fault: Fault, schedules: int) -> Outcome:
    # A process that hangs says where and ends, and the command with it.
    faulthandler.dump_traceback_later(RUN_SECONDS * schedules, exit=True)
    try:
        return _inherited[-1].outcome(fault, schedules)
    finally:
        faulthandler.cancel_dump_traceback_later()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the status is 1 if fewer than 95 % of a subject's faults are caught."""
    parser = argparse.ArgumentParser(prog="python -m ptx_emulator.cli.faults", description=__doc__)
    parser.add_argument("--subject", choices=SUBJECTS, action="append", help="default: all")
    parser.add_argument("--per-kind", type=int, default=12, help="at most so many of a kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--schedules", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="which faults of a kind are drawn")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the report here")
    given = parser.parse_args(arguments)
    bootstrap()
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    start = time.perf_counter()
    reports = {name: run(name, given) for name in given.subject or SUBJECTS}
    report = {"seconds": round(time.perf_counter() - start), "subjects": reports}
    text = json.dumps(report, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    return int(any(r["caught"] < 0.95 * r["faults"] for r in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
