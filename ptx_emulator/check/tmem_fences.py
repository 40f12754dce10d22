"""Accesses to tensor memory that no tcgen05.fence orders; for sessions with strict="fences".

The PTX manual: what a tcgen05 instruction of one thread did comes before one of another thread only
if the first is followed by `fence::before_thread_sync`, then by something that the other waits for,
and that wait by `fence::after_thread_sync`. A commit stands for the former. Kernels that are right
on cards do without, so this is no fault unless it is asked for.

For each CTA of a cluster, each quarter of the lanes and each column: when which warp last wrote and
read it. A product is an access of the warp that issued it, at the time when it is done.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from ..findings import Findings, Race
from ..machine.tmem import COLUMNS, Region

Agent = tuple[int, int]  # rank of the CTA, warp
WRITE, READ = 0, 1
QUARTER = 32  # lanes


class FenceWatch:
    """The accesses and fences of one cluster."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.now = 1
        self.before: dict[Agent, int] = defaultdict(int)  # last fence or commit, by time
        self.after: dict[Agent, int] = defaultdict(int)
        self.logs: dict[tuple[int, int], dict[Agent, np.ndarray]] = defaultdict(dict)

    def fence(self, agent: Agent, before: bool) -> None:
        self.now += 1
        (self.before if before else self.after)[agent] = self.now

    def check(self, agent: Agent, rank: int, region: Region, writes: bool, what: str) -> None:
        """Report if what `agent` is about to do must come after something that no fence orders."""
        columns = slice(region.first, region.last)
        for quarter in range(region.low // QUARTER, -(-region.high // QUARTER)):
            for other, log in self.logs[rank, quarter].items():
                if other == agent:
                    continue
                last = int(log[:, columns].max() if writes else log[WRITE, columns].max())
                for side, fenced in (("before", self.before[other]), ("after", self.after[agent])):
                    if last > fenced:
                        who = other if side == "before" else agent
                        self.findings.report(
                            Race(
                                f"{what} of columns {region.first} .. {region.last}: no tcgen05."
                                f"fence::{side}_thread_sync of warp {who[1]} of rank {who[0]} "
                                f"orders it after an access of warp {other[1]}"
                            )
                        )

    def log(self, agent: Agent, rank: int, region: Region, writes: bool) -> None:
        """Note an access that is done."""
        self.now += 1
        for quarter in range(region.low // QUARTER, -(-region.high // QUARTER)):
            logs = self.logs[rank, quarter]
            if agent not in logs:
                logs[agent] = np.zeros((2, COLUMNS), np.int64)
            logs[agent][WRITE if writes else READ, region.first : region.last] = self.now


def fences_of(cta: Any) -> FenceWatch | None:
    """The watch of a CTA's cluster, if the session wants it."""
    findings = cta.machine.findings
    if not findings.fences:
        return None
    state = cta.peers[0].state
    if "tcgen05 fences" not in state:
        state["tcgen05 fences"] = FenceWatch(findings)
    return state["tcgen05 fences"]
