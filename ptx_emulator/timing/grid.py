"""From what tiles cost to the launch of a whole problem: CTAs in waves over the card's SMs."""

import heapq
from dataclasses import dataclass

import numpy as np

from .problems import BLOCK, Costs, Runs
from .table import Machine

ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Problem:
    """A forward problem: equal lengths of queries and keys."""

    batch: int
    seqlen: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool

    @property
    def flops(self) -> float:
        """As everybody counts: half of them if causal."""
        dense = 2 * self.batch * self.heads * self.seqlen**2 * (self.head_dim + self.head_dim_v)
        return dense / 2 if self.causal else dense

    @property
    def bytes(self) -> float:
        """Q, K, V and O once."""
        per_token = self.heads * (self.head_dim + self.head_dim_v)
        per_token += self.heads_kv * (self.head_dim + self.head_dim_v)
        return ELEMENT_BYTES * self.batch * self.seqlen * per_token


@dataclass(frozen=True)
class Prediction:
    """`waves`: tiles that the busiest SM takes; `share` of the card's time that its SMs work."""

    us: float
    tflops: float
    waves: float
    share: float


def predict(problem: Problem, runs: Runs, costs: Costs, machine: Machine) -> Prediction:
    """Time of one launch.

    Tiles come longest first, as all kernels here order causal ones. Where a CTA takes one, the next
    one goes to whichever SM is free. Persistent CTAs pay their start once, and have fixed shares.
    Every SM's clock is the table's, whatever the load.
    """
    tiles = -(-problem.seqlen // runs.rows)
    units = int(machine["sms"]) // runs.ctas * runs.per_sm
    lengths = []
    for index in range(tiles - 1, -1, -1):
        keys = min(problem.seqlen, (index + 1) * runs.rows) if problem.causal else problem.seqlen
        lengths += [-(-keys // BLOCK)] * (problem.batch * problem.heads)
    each = [costs.tile + blocks * costs.block for blocks in lengths]
    if runs.persistent:
        ends, start = shares(each, units), costs.start
    else:
        ends, start = _greedy([cycles + costs.start for cycles in each], units), 0.0
    cycles = start + max(ends)
    busy = sum(ends) / (len(ends) * max(ends))
    us = machine["launch_us"] + cycles / (1000 * machine["clock_ghz"])
    us = max(us, machine["launch_us"] + problem.bytes / machine["hbm_bytes_us"])
    return Prediction(us, problem.flops / us / 1e6, len(each) / units, busy)


def shares(jobs: list[float], units: int) -> list[float]:
    """When each unit ends that takes every so many-th job, units forwards and backwards in turn."""
    rounds = -(-len(jobs) // units)
    padded = jobs + [0.0] * (rounds * units - len(jobs))
    by_turn = np.array(padded).reshape(rounds, units)
    by_turn[1::2] = by_turn[1::2, ::-1].copy()
    return list(map(float, by_turn.sum(axis=0)))


def _greedy(jobs: list[float], units: int) -> list[float]:
    """When each unit ends that takes the next job as soon as it is free."""
    ends = [0.0] * units
    if len(set(jobs)) == 1:
        rounds, rest = divmod(len(jobs), units)
        return [jobs[0] * (rounds + (unit < rest)) for unit in range(units)]
    heapq.heapify(ends)
    for job in jobs:
        heapq.heapreplace(ends, ends[0] + job)
    return ends
