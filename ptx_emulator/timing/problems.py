"""What is modelled: kernels, the runs of the emulator that their streams come from, and what CTAs
cost by these.

Loops are long and streams are short: a few tiles of a few blocks of keys are recorded. Replayed,
they give the cycles of a run of T tiles with B key blocks of 128 in all,

    start + T tile + B block

from some runs of a kernel whose CTAs take one tile after another (few tiles, more blocks, more
tiles), or from the CTAs of one causal launch, which have different numbers of blocks each. `tile`
is what a tile costs beside its blocks: its first loads, its masked blocks, its output, as far as
its neighbours do not hide them.
"""

import hashlib
import importlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..machine.cards import Card, card_of
from .record import Recorder, Recording, listening
from .replay import UNITS, Streams, replay, streams_of
from .table import Machine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "timing"
BLOCK = 128  # keys, the unit of `block`
SHORT, LONG = 512, 1024  # keys of the recorded runs
LONGEST = 2048  # of causal ones: a tile's first blocks cost less than those that follow
FEW = 256  # queries, not so few that the kernels for decoding take them
MANY_SMS = 64
SCHEDULERS = frozenset({"fma", "alu", "mufu", "tensor", "lsu", "tmem", "issue slots"})  # four an SM
SM_SMEM, SYSTEM_SMEM = 233472, 1024  # bytes of an SM, and of each CTA for the system
SM_REGISTERS, MOST_REGISTERS = 65536, 255  # what ptxas takes is not known here: at most
UPSTREAM_ROWS = 256  # of a CTA of upstream's tcgen05 kernel: two tiles of 128 queries


@dataclass(frozen=True)
class Kernel:
    """A kernel of the table: who wrote it, for which card, for which heads and mask."""

    who: str  # ours, upstream, upstream-sm120
    arch: str
    head_dim: int
    head_dim_v: int
    causal: bool
    pairs: bool = False  # ours: causal tiles by pairs of CTAs, as the plan has it for many keys

    @property
    def name(self) -> str:
        dims = f"{self.head_dim}" + (
            f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        )
        pairs = " in pairs" if self.pairs else ""
        return f"{self.who} {self.arch} d{dims} {'causal' if self.causal else 'dense'}{pairs}"


@dataclass(frozen=True)
class Run:
    """One recorded run on one SM, or one pair: its tiles, its blocks, its CTAs."""

    tiles: int
    blocks: int
    recording: Recording
    ctas: list[tuple[int, int, int]]

    def streams(self, machine: Machine) -> Streams:
        return streams_of(self.recording, machine, self.ctas)


@dataclass(frozen=True)
class Runs:
    """All recorded runs of a kernel."""

    kernel: Kernel
    rows: int  # queries of a tile
    ctas: int  # that take a tile together, each on its own SM
    per_sm: int  # CTAs that an SM holds at a time
    persistent: bool
    runs: list[Run]


@dataclass(frozen=True)
class Costs:
    """Cycles of an SM, or of one of `per_sm` CTAs that share it."""

    start: float
    tile: float
    block: float

    def cycles(self, tiles: float, blocks: float) -> float:
        return self.start + tiles * self.tile + blocks * self.block


def _session_card(arch: str, num_sms: int) -> Card:
    card = card_of(arch)
    return Card(card.arch, card.major, card.minor, num_sms, card.smem_per_cta, card.threads_per_sm)


@contextmanager
def _as_planned(kernel: Kernel, num_sms: int) -> Iterator[Any]:
    """The adapter's forward function, for a card with so many SMs."""
    from flash_attn4_cute.sm100 import pairing

    from ..cli import ours, third_party

    if kernel.who == "ours":
        usual, ours.NUM_SMS = ours.NUM_SMS, num_sms
        pays = pairing.pays_in_pairs
        if kernel.pairs:  # also for the few queries that are recorded
            pairing.pays_in_pairs = lambda row, p: True
        try:
            yield ours.forward
        finally:
            ours.NUM_SMS, pairing.pays_in_pairs = usual, pays
        return
    upstream = importlib.import_module("tests.emulator.upstream")
    before = dict(upstream.ARCH)
    if kernel.who == "upstream-sm120":
        upstream.ARCH[kernel.arch] = "sm_120"
    try:
        yield third_party.forward
    finally:
        upstream.ARCH.update(before)


def record(kernel: Kernel, rows: int, keys: int, num_sms: int) -> Recording:
    """The streams of one launch: one head of so many queries and keys."""
    import torch

    from ..cli.case import Case, make_inputs
    from ..session import session

    case = Case(
        dtype=torch.bfloat16, batch=1, heads=1, kv_heads=1, seqlen_q=rows, seqlen_k=keys,
        head_dim=kernel.head_dim, head_dim_v=kernel.head_dim_v, right=0 if kernel.causal else None,
    )  # fmt: skip
    recorder = Recorder()
    card = _session_card(kernel.arch, num_sms)
    with (
        _as_planned(kernel, num_sms) as forward,
        session(card, races=False, trace=recorder) as emulator,  # type: ignore[arg-type]
    ):
        forward(emulator, case, make_inputs(case))
    return recorder.recordings[0]


def occupancy(recording: Recording, kernel: Kernel) -> int:
    """CTAs that fit on an SM, by shared memory and registers."""
    smem = recording.shared_bytes + SYSTEM_SMEM
    registers = min(recording.flow.kernel.max_registers or MOST_REGISTERS, MOST_REGISTERS)
    held = 32 * recording.num_warps * (-(-registers // 8) * 8)
    return max(1, min(SM_SMEM // smem, SM_REGISTERS // held))


def runs_of(kernel: Kernel) -> Runs:
    """Record a kernel's runs, or take them from the cache."""
    path = CACHE / f"{_digest(kernel)}.pickle"
    if path.exists():
        return pickle.loads(path.read_bytes())
    with listening():
        found = _recorded(kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(found))
    return found


def _recorded(kernel: Kernel) -> Runs:
    # As many SMs as there are tiles, so that a CTA takes one; upstream compiles its number in.
    alone = MANY_SMS if kernel.causal or kernel.who == "ours" else 2
    queries = LONGEST if kernel.causal else LONG
    first = record(kernel, queries, BLOCK if kernel.who == "ours" else queries, alone)
    ctas = first.cluster
    tiles = len(first.streams) // ctas
    rows = 64 * -(-queries // tiles // 64)
    if alone == 2 and len(first.streams) == 2:
        rows = UPSTREAM_ROWS * ctas // (2 if kernel.head_dim > 192 else 1)
    facts = (rows, ctas, occupancy(first, kernel))
    if kernel.causal and kernel.who == "ours":
        return _causal_in_turn(kernel, *facts)
    if kernel.causal:
        groups = _clusters(first, ctas)
        runs = [
            Run(1, _visible_blocks(index, rows), first, group)
            for index, group in _by_length(first, groups)
        ]
        return Runs(kernel, *facts, False, runs)
    runs = []
    few = max(rows, FEW) if kernel.who == "ours" else rows
    for queries, keys in ((few, SHORT), (few, LONG), (3 * rows, SHORT), (3 * rows, LONG)):
        # On two SMs the first CTA takes two of three tiles where a CTA takes one after another.
        recording = record(kernel, queries, keys, 2)
        groups = _clusters(recording, ctas)
        taken = -(-(queries // rows) // len(groups))
        busiest = max(groups, key=lambda group: _size(recording, group))
        runs.append(Run(taken, taken * keys // BLOCK, recording, busiest))
    return Runs(kernel, *facts, runs[-1].tiles > 1, runs)


def _causal_in_turn(kernel: Kernel, rows: int, ctas: int, per_sm: int) -> Runs:
    """Runs of one CTA, or pair, that takes all tiles of a causal launch, the longest first."""
    runs = []
    few = max(rows, FEW)
    other = SHORT if rows < SHORT else LONGEST  # the first run has one tile of SHORT
    for queries, keys in ((few, SHORT), (few, LONGEST), (other, other), (LONG, LONG)):
        recording = record(kernel, queries, keys, ctas)
        (group,) = _clusters(recording, ctas)
        tiles = queries // rows
        ends = [keys - rows * index for index in range(tiles)]
        runs.append(Run(tiles, sum(-(-end // BLOCK) for end in ends), recording, group))
    return Runs(kernel, rows, ctas, per_sm, True, runs)


def _clusters(recording: Recording, ctas: int) -> list[list[tuple[int, int, int]]]:
    ids = sorted(recording.streams, key=lambda c: (c[2], c[1], c[0]))
    return [ids[i : i + ctas] for i in range(0, len(ids), ctas)]


def _by_length(
    recording: Recording, groups: list[list[tuple[int, int, int]]]
) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Causal tiles by how much they ran: the index of each from the top of the matrix."""
    return list(enumerate(sorted(groups, key=lambda group: _size(recording, group))))


def _size(recording: Recording, group: list[tuple[int, int, int]]) -> int:
    """Blocks of code that CTAs ran."""
    return sum(len(stream.blocks) for cta in group for stream in recording.streams[cta])


def _visible_blocks(index: int, rows: int) -> int:
    return -(-(index + 1) * rows // BLOCK)


@dataclass
class Lowered:
    """A kernel's runs as arrays, for one arch: replayed again and again by the calibration."""

    runs: Runs
    streams: list[Streams]

    def cycles(self, machine: Machine) -> np.ndarray:
        """Of each run, beside as many copies of itself as share the SM."""
        sms = [0] * self.runs.per_sm if self.runs.per_sm > 1 else None
        return np.array([replay(streams, machine, sms).cycles for streams in self.streams])

    def busy(self, machine: Machine, most: int = 3) -> list[tuple[str, float]]:
        """The units that are busiest in the longest run, and the share of its cycles."""
        sms = [0] * self.runs.per_sm if self.runs.per_sm > 1 else None
        sizes = [(run.tiles * run.blocks, at) for at, run in enumerate(self.runs.runs)]
        found = replay(self.streams[max(sizes)[1]], machine, sms)
        of_sm = [4 if name in SCHEDULERS else 1 for name in UNITS]
        shares = found.busy[0] / of_sm / found.cycles
        return sorted(zip(UNITS, map(float, shares), strict=True), key=lambda x: -x[1])[:most]

    def costs(self, machine: Machine) -> Costs:
        """Least squares of start, tile and block."""
        cycles = self.cycles(machine)
        if self.runs.persistent:
            left = np.array([(1, run.tiles, run.blocks) for run in self.runs.runs], float)
            start, tile, block = np.linalg.lstsq(left, cycles, rcond=None)[0]
            return Costs(float(start), float(tile), float(block))
        left = np.array([(1, run.blocks) for run in self.runs.runs], float)
        # The shortest tiles hide nothing and are few in a launch: they weigh less.
        weight = np.sqrt(left[:, 1])
        tile, block = np.linalg.lstsq(left * weight[:, None], cycles * weight, rcond=None)[0]
        return Costs(machine["cta_cycles"], float(tile), float(block))


def lowered(kernel: Kernel, machine: Machine) -> Lowered:
    """Record a kernel, or take it from the cache, and lower it for a machine's pipes."""
    runs = runs_of(kernel)
    streams = [run.streams(machine) for run in runs.runs]
    if runs.per_sm > 1:
        streams = [one.times(runs.per_sm) for one in streams]
    return Lowered(runs, streams)


def _digest(kernel: Kernel) -> str:
    """Of what streams depend on: our kernels, how PTX is cut into blocks, and what is recorded.

    How the emulator executes an instruction does not count, as long as it executes it rightly.
    """
    found = hashlib.sha1(repr(kernel).encode())
    sources = [Path(__file__), Path(__file__).with_name("record.py")]
    sources += sorted((ROOT / "ptx_emulator" / "ptx").glob("*.py"))
    if kernel.who == "ours":
        other = "sm120" if kernel.arch in ("sm_100a", "sm_103a") else "sm100"
        ours = sorted((ROOT / "flash_attn4_cute").rglob("*.py"))
        sources += [path for path in ours if other not in path.parts]
    for path in sources:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
