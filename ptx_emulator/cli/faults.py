"""`python -m ptx_emulator.cli.faults`: seeded faults in whole kernels, and which are noticed.

One JSON object comes out: for each subject and kind of fault how often it was noticed and by what
(the kind of the finding, or "wrong result"), and every fault that no schedule noticed. Only places
that the faultless run reaches are tried.

Many processes, here or elsewhere, may share a campaign: `--shard I/N --lines FILE` each, and then
`--merge FILES`.
"""

import argparse
import faulthandler
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..launch.host import Launch, bootstrap
from ..mutation import KINDS, Fault, faults, planted, sample, verdict
from ..ptx.program import load
from ..session import Session
from .case import Case, Inputs, judge
from .fault_report import Head, Lines, Outcome, merge, report, summary
from .subjects import SUBJECTS, Subject, make_steep_inputs

RUN_SECONDS = 300  # of one schedule, on a busy machine; who spins for ever is found sooner


class Campaign:
    """The faults of one subject."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.questions = [(case, make_steep_inputs(case)) for case in subject.cases]
        launches = [self.faultless(*question) for question in self.questions]
        self.ptx = launches[0].ptx
        if any(launch.ptx != self.ptx for launch in launches):
            raise ValueError("the questions are answered by different kernels")
        self.text = self.ptx.split("\n")
        self.reached = load(self.ptx, launches[0].kernel).reached_lines()

    def faultless(self, case: Case, inputs: Inputs) -> Launch:
        """The last launch that answers a question.

        Raises:
            ValueError: the answer is wrong.
        """
        launches: list[Launch] = []
        with self.subject.session(0) as emulator:
            plain = emulator.host.on_launch
            assert plain is not None

            def watch(launch: Launch) -> None:
                launches.append(launch)
                plain(launch)

            emulator.host.on_launch = watch
            if not self.right(emulator, case, inputs):
                raise ValueError(f"the kernel is wrong without any fault: {case}")
        return launches[-1]

    def right(self, emulator: Session, case: Case, inputs: Inputs) -> bool:
        return judge(case, inputs, *self.subject.forward(emulator, case, inputs)).ok

    def faults(self) -> list[Fault]:
        """The faults in instructions that the faultless runs execute."""
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
        for schedule, question in product(range(schedules), self.questions):
            with (
                self.subject.session(schedule) as emulator,
                planted(emulator, self.ptx, fault),
            ):
                said = verdict(partial(self.right, emulator, *question))
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


Drawn = list[tuple[int, Fault]]  # with their numbers


def draw(campaign: Campaign, given: argparse.Namespace) -> Drawn:
    """The faults that are to be tried, by all shards together."""
    found = [f for f in campaign.faults() if not given.line or campaign.place(f) in given.line]
    wanted = sample(found, given.per_kind, given.seed) if given.per_kind else found
    wanted = [fault for fault in wanted if not given.kind or fault.kind in given.kind]
    return list(enumerate(wanted))


def run(names: Sequence[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The reports on subjects. Faults are shared out to processes that know all kernels."""
    campaigns = {name: Campaign(SUBJECTS[name]) for name in names}
    drawn = {name: draw(campaign, given) for name, campaign in campaigns.items()}
    lines, heads = Lines(given.lines), []
    for name, campaign in campaigns.items():
        sha, places = hashlib.sha256(campaign.ptx.encode()).hexdigest(), len(campaign.faults())
        heads.append(Head(name, sha, given.schedules, places, len(drawn[name])))
        lines.head(heads[-1])
    outcomes: dict[str, dict[int, Outcome]] = {name: {} for name in names}
    for (name, number), found in _try_all(campaigns, drawn, given):
        outcomes[name][number] = found
        lines.outcome(name, number, found)
        print(name, found, file=sys.stderr, flush=True)
    return {
        head.subject: report(head, [found for _, found in sorted(outcomes[head.subject].items())])
        for head in heads
    }


def _try_all(
    campaigns: dict[str, Campaign], drawn: dict[str, Drawn], given: argparse.Namespace
) -> Iterator[tuple[tuple[str, int], Outcome]]:
    """(subject, number) and outcome of each fault of this shard.

    In random order, so that those who are tried when time is up are a fair sample.
    """
    first, step = map(int, given.shard.split("/"))
    wanted = [(name, *found) for name in drawn for found in drawn[name][first - 1 :: step]]
    random.Random(given.seed).shuffle(wanted)
    tasks: dict[Future[Outcome], tuple[str, int]] = {}
    with ProcessPoolExecutor(given.jobs, get_context("fork"), _inherit, (campaigns,)) as pool:
        for name, number, fault in wanted:
            tasks[pool.submit(_outcome, name, fault, given.schedules)] = name, number
        try:
            for task in as_completed(tasks, given.seconds):
                yield tasks.pop(task), task.result()
        except TimeoutError:
            pass
        finally:
            pool.shutdown(cancel_futures=True)  # those who have begun end
    yield from ((who, task.result()) for task, who in tasks.items() if not task.cancelled())


_inherited: dict[str, Campaign] = {}


def _inherit(campaigns: dict[str, Campaign]) -> None:
    _inherited.update(campaigns)


def _outcome(name: str, fault: Fault, schedules: int) -> Outcome:
    # A process that hangs says where and ends, and the command with it.
    faulthandler.dump_traceback_later(RUN_SECONDS * schedules, exit=True)
    try:
        return _inherited[name].outcome(fault, schedules)
    except Exception as error:  # the emulator's own fault: nothing that it noticed
        text = f"{type(error).__name__}: {error}"
        return Outcome(fault.kind, Campaign.place(fault), text, "", -1)
    finally:
        faulthandler.cancel_dump_traceback_later()


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m ptx_emulator.cli.faults", description=__doc__)
    p.add_argument("--subject", choices=SUBJECTS, action="append", help="default: all")
    p.add_argument("--per-kind", type=int, default=12, help="at most so many of a kind; 0: all")
    p.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    p.add_argument("--line", type=int, action="append", help="of the PTX; default: all")
    p.add_argument("--schedules", type=int, default=16)
    p.add_argument("--seed", type=int, default=0, help="which faults of a kind are drawn")
    p.add_argument("--jobs", type=int, default=1, help="processes")
    p.add_argument("--seconds", type=float, help="begin with no other fault after so long")
    p.add_argument("--shard", default="1/1", help="I/N: every N-th fault, from the I-th on")
    p.add_argument("--lines", type=Path, help="write each outcome here as soon as it is known")
    p.add_argument("--merge", type=Path, nargs="+", help="run nothing: report on such files")
    p.add_argument("--json", type=Path, help="write the report here")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the status is 1 if fewer than 95 % of a subject's faults are caught."""
    given = parser().parse_args(arguments)
    start = time.perf_counter()
    if given.merge:
        reports = merge(given.merge)
    else:
        bootstrap()
        torch.set_num_threads(1)  # a forked process does not have its parent's threads
        reports = run(given.subject or list(SUBJECTS), given)
    whole = {"seconds": round(time.perf_counter() - start), "subjects": reports}
    text = json.dumps(whole, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    for name, found in reports.items():
        print(summary(name, found), file=sys.stderr)
    return int(any(r["caught"] < 0.95 * r["faults"] for r in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
