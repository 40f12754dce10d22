"""Streams as arrays for replay.cpp, and what it answers."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..launch.build import cache_dir
from .lower import KIND, PIPE, PIPES, Chain, Op, chains
from .record import CLUSTER, Recording
from .table import Machine

SOURCE = Path(__file__).with_name("replay.cpp")
UNITS = (*PIPES, "tensor core", "tmem", "smem", "l2", "issue slots")
TENSOR_UNIT, TMEM_UNIT = len(PIPES), len(PIPES) + 1
KEPT = 200_000  # intervals of units

# The order of replay.cpp's struct Machine.
NAMES = (
    "tensor_flops", "smem_bytes", "tmem_read_bytes", "tmem_write_bytes", "l2_bytes", "mufu_queue",
    "tma_latency", "store_latency", "mma_latency", "sync_latency", "arrive_latency",
    "commit_latency", "issue_stretch", "tmem_latency",
)  # fmt: skip

OP = np.dtype(
    [(n, np.int32) for n in ("kind", "pipe", "blocking", "r0", "r1", "w0", "w1")]
    + [(n, np.float32) for n in ("cycles", "latency", "slots", "amount")]
)


class _Input(ctypes.Structure):
    _fields_ = [
        ("ops", ctypes.c_void_p),
        ("registers", ctypes.c_void_p),
        *[(n, ctypes.c_int32) for n in (
            "num_registers", "num_warps", "num_ctas", "num_sms", "num_barriers", "num_units_kept",
        )],
        *[(n, ctypes.c_void_p) for n in (
            "warp_cta", "warp_number", "warp_start", "code", "names_start", "names", "cta_sm",
            "cta_cluster", "cta_peer", "cta_begin", "barrier_counts", "issue", "warp_end", "busy",
            "kept",
        )],
    ]  # fmt: skip


def library() -> Any:
    """replay.cpp, built once per machine and version."""
    digest = hashlib.sha1(SOURCE.read_bytes()).hexdigest()[:12]
    target = cache_dir() / f"libptx_emulator_replay_{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            flags = ("-O2", "-shared", "-fPIC", "-std=c++17")
            command = [os.environ.get("CXX", "g++"), *flags, "-o", str(built), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(target)
    found = ctypes.CDLL(str(target))
    found.replay.restype = ctypes.c_int
    return found


class Stuck(RuntimeError):
    """Warps wait for what never comes: a stream, or the model, is wrong."""


@dataclass
class Streams:
    """The warps of some CTAs, flat: what replay.cpp takes but for the machine's constants."""

    arch: str
    ops: np.ndarray
    registers: np.ndarray
    num_registers: int
    code: np.ndarray
    warp_start: np.ndarray
    warp_cta: np.ndarray
    warp_number: np.ndarray
    names_start: np.ndarray
    names: np.ndarray
    barrier_counts: np.ndarray
    cluster: int  # CTAs
    ctas: list[tuple[int, int, int]]
    lines: list[tuple[int, str, str]] = field(default_factory=list)  # of ops: line, opcode, pipe

    @property
    def num_ctas(self) -> int:
        return len(self.ctas)

    def times(self, number: int) -> "Streams":
        """The same CTAs so many times, each time with barriers of their own."""
        names, barriers = [], len(self.barrier_counts)
        on_barriers = self._name_barriers()
        for turn in range(number):
            copy = self.names.copy()
            copy[on_barriers, 0] += turn * barriers
            names.append(copy)
        length, pairs = len(self.code), len(self.names)
        turns = range(number)
        return replace(
            self,
            code=np.tile(self.code, number),
            warp_start=np.concatenate(
                [[0], *[self.warp_start[1:] + turn * length for turn in turns]]
            ),
            warp_cta=np.concatenate(
                [self.warp_cta + turn * self.num_ctas for turn in turns]
            ).astype(np.int32),
            warp_number=np.tile(self.warp_number, number),
            names_start=np.concatenate(
                [[0], *[self.names_start[1:] + turn * pairs for turn in turns]]
            ),
            names=np.concatenate(names),
            barrier_counts=np.tile(self.barrier_counts, number),
            ctas=self.ctas * number,
        )

    def _name_barriers(self) -> np.ndarray:
        """Which names are mbarriers, and neither shapes nor named barriers."""
        other = [KIND[kind] for kind in ("product", "named_sync", "named_arrive", "store")]
        counts = np.diff(self.names_start)
        kinds = np.repeat(self.ops["kind"][self.code], counts)
        found = np.zeros(len(self.names), bool)
        found[: len(kinds)] = ~np.isin(kinds, other)
        return found


@dataclass(frozen=True)
class Result:
    """Cycles. `busy` by SM and unit; `issue` by place in the code, where it was asked for."""

    warp_end: np.ndarray
    busy: np.ndarray
    issue: np.ndarray | None
    units: np.ndarray  # (unit, SM, start, end) of products and of tensor memory

    @property
    def cycles(self) -> float:
        return float(self.warp_end.max())


def streams_of(recording: Recording, machine: Machine, only: Any = None) -> Streams:
    """Streams of the CTAs in `only` (all if None), for a machine's pipes."""
    return _Builder(recording, machine).build(only)


class _Builder:
    def __init__(self, recording: Recording, machine: Machine) -> None:
        self.recording, self.machine = recording, machine
        flow = recording.flow
        self.chains: dict[int, Chain] = chains(flow, machine)
        self.ops: list[Op] = []
        self.codes: dict[int, np.ndarray] = {}  # chain -> ops
        for head, chain in self.chains.items():
            first = len(self.ops)
            self.ops += chain.ops
            self.codes[head] = np.arange(first, len(self.ops), dtype=np.int32)
        self.code: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.names: list[tuple[int, int]] = []

    def warp(self, stream: Any) -> int:
        """Append a warp's code; its length."""
        at, length = 0, 0
        blocks = stream.blocks
        while at < len(blocks):
            chain = self.chains[blocks[at]]
            size = len(chain.blocks)
            if blocks[at : at + size] != chain.blocks:
                raise Stuck(f"a warp leaves the chain {chain.blocks} at {blocks[at : at + size]}")
            named = [names for part in stream.names[at : at + size] for names in part]
            counts = np.zeros(len(chain.ops), np.int64)
            for place, dynamic in enumerate(chain.dynamic):
                if dynamic >= 0:
                    counts[place] = len(named[dynamic])
                    self.names += named[dynamic]
            self.code.append(self.codes[blocks[at]])
            self.counts.append(counts)
            length += len(chain.ops)
            at += size
        return length

    def build(self, only: Any) -> Streams:
        recording = self.recording
        ctas = [c for c in recording.streams if only is None or c in only]
        starts, warp_cta, warp_number = [0], [], []
        for index, cta in enumerate(ctas):
            for number, stream in enumerate(recording.streams[cta]):
                starts.append(starts[-1] + self.warp(stream))
                warp_cta.append(index)
                warp_number.append(number)
        counts = np.concatenate(self.counts) if self.counts else np.zeros(0, np.int64)
        ops, registers = table_of(self.ops)
        names = np.array(self.names or [(0, 0)], np.int32)
        names[names[:, 0] == CLUSTER, 0] = 0
        return Streams(
            arch=self.machine.arch,
            ops=ops,
            registers=registers,
            num_registers=len(recording.flow.kernel.registers),
            code=np.concatenate(self.code),
            warp_start=np.array(starts, np.int64),
            warp_cta=np.array(warp_cta, np.int32),
            warp_number=np.array(warp_number, np.int32),
            names_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            names=names,
            barrier_counts=np.array(recording.counts or [1], np.int32),
            cluster=recording.cluster,
            ctas=ctas,
            lines=[(op.line, op.name, op.pipe) for op in self.ops],
        )


def table_of(ops: list[Op]) -> tuple[np.ndarray, np.ndarray]:
    table = np.zeros(len(ops), OP)
    registers: list[int] = []
    for row, op in zip(table, ops, strict=True):
        first, middle = len(registers), len(registers) + len(op.reads)
        registers += [*op.reads, *op.writes]
        row["kind"], row["pipe"], row["blocking"] = KIND[op.kind], PIPE[op.pipe], op.blocking
        row["r0"], row["r1"], row["w0"], row["w1"] = first, middle, middle, len(registers)
        row["cycles"], row["latency"] = op.cycles, op.latency
        row["slots"], row["amount"] = op.slots, op.amount
    return table, np.array(registers or [0], np.int32)


def replay(
    streams: Streams, machine: Machine, sms: list[int] | None = None, traced: bool = False
) -> Result:
    """Run the streams on the machine's units.

    Args:
        sms: the SM of each CTA; by default each has its own.
        traced: keep when each instruction issued, and when tensor cores and memory were busy.
    """
    n = streams.num_ctas
    places = np.array(range(n) if sms is None else sms, np.int32)
    clusters = np.array([i // streams.cluster for i in range(n)], np.int32)
    peers = np.array([i ^ 1 if streams.cluster > 1 else i for i in range(n)], np.int32)
    num_sms, num_warps = int(places.max()) + 1, len(streams.warp_cta)
    end, busy = np.zeros(num_warps), np.zeros((num_sms, len(UNITS)))
    issue = np.zeros(len(streams.code)) if traced else None
    units = np.zeros((KEPT if traced else 1, 4))
    begin, stuck = np.zeros(n), np.zeros(num_warps, np.int64)
    keep = [places, clusters, peers, end, busy, units, begin, stuck]

    def at(array: np.ndarray | None) -> Any:
        return None if array is None else array.ctypes.data

    constants = np.array([machine[name] for name in NAMES])
    given = _Input(
        at(streams.ops), at(streams.registers), streams.num_registers, num_warps, n, num_sms,
        len(streams.barrier_counts), KEPT if traced else 0, at(streams.warp_cta),
        at(streams.warp_number), at(streams.warp_start), at(streams.code), at(streams.names_start),
        at(streams.names), at(places), at(clusters), at(peers), at(begin),
        at(streams.barrier_counts), at(issue), at(end), at(busy), at(units),
    )  # fmt: skip
    failed = library().replay(
        ctypes.byref(given), ctypes.c_void_p(at(constants)), ctypes.c_void_p(at(stuck))
    )
    del keep
    if failed:
        raise Stuck(_who_waits(streams, end, stuck))
    return Result(end, busy, issue, units[units[:, 3] > 0])


def _who_waits(streams: Streams, end: np.ndarray, stuck: np.ndarray) -> str:
    lines = ["the replayed warps wait for each other:"]
    for warp in np.flatnonzero(end < 0):
        place = int(stuck[warp]) - 1
        line, name, _ = streams.lines[streams.code[place]]
        cta = streams.ctas[streams.warp_cta[warp]]
        a, b = streams.names_start[place : place + 2]
        names = streams.names[a:b].tolist()
        lines.append(f"  CTA {cta} warp {streams.warp_number[warp]}: {name} line {line} {names}")
    return "\n".join(lines)
