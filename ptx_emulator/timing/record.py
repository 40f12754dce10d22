"""Streams: the basic blocks that each warp of a launch ran, and what its synchronisation named.

Only what differs from one execution of an instruction to the next is kept: which mbarrier, how many
arrivals or bytes, which shape of product. Everything else follows from the instruction. A wait is
kept once, however often the emulated warp tested its barrier: how long it takes is the model's
business, which replays barriers as the machine counts them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..instructions import bulk_copy, cp_async, launch_control, mbarrier, sync, tcgen05
from ..instructions import tcgen05_mma as products
from ..machine.gang import Gang
from ..machine.machine import Machine
from ..machine.memory import RANK_SHIFT
from ..ptx import program as programs
from ..ptx.flow import Flow
from ..ptx.syntax import Instruction

# What one execution of a dynamic instruction names: (barrier or shape, number) pairs.
Names = tuple[tuple[int, int], ...]

CLUSTER = -1  # instead of a barrier's number: the barrier of the cluster
FAILED = 2  # added to the parity of a test that did not find the phase over
CANCEL_BYTES = 16


def is_dynamic(ins: Instruction) -> bool:
    """Whether executions of the instruction call one of the functions that are listened to."""
    name, has = ins.opcode, ins.has
    if name == "mbarrier":
        return has("arrive", "expect_tx", "complete_tx", "try_wait", "test_wait")
    if name in ("bar", "barrier"):
        return not has("warp")
    if name == "cp":
        if has("commit_group", "wait_group", "wait_all"):
            return False
        return has("bulk", "mbarrier")
    if name == "tcgen05":
        return has("mma", "commit")
    return name == "clusterlaunchcontrol" and has("try_cancel")


@dataclass
class Stream:
    """One warp's blocks, and the names of each dynamic instruction in them, in order."""

    blocks: list[int] = field(default_factory=list)
    names: list[list[Names]] = field(default_factory=list)  # one list a block


@dataclass
class Recording:
    """A launch: streams by CTA and warp, and the barriers, numbered over all CTAs."""

    num_warps: int
    flow: Flow
    cluster: int  # CTAs
    shared_bytes: int
    streams: dict[tuple[int, int, int], list[Stream]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)  # arrivals of a phase, by barrier
    homes: list[tuple[int, int, int]] = field(default_factory=list)  # the CTA, by barrier
    numbers: dict[int, int] = field(default_factory=dict)  # id of an MBarrier -> its number
    alive: list[Any] = field(default_factory=list)  # so that no id is used twice
    events: list[dict[int, list[tuple[int, int]]]] = field(default_factory=list)

    def barrier(self, found: Any, home: tuple[int, int, int]) -> int:
        """The number of an MBarrier."""
        if id(found) not in self.numbers:
            self.numbers[id(found)] = len(self.counts)
            self.counts.append(found.count)
            self.homes.append(home)
            self.alive.append(found)
        return self.numbers[id(found)]

    def of(self, gang: Gang, address: int) -> int:
        cta, _ = gang.cta.locate(address)
        return self.barrier(gang.cta.mbarrier(address), cta.ctaid)

    def stream(self, gang: Gang) -> list[Stream]:
        streams = self.streams.get(gang.cta.ctaid)
        if streams is None:
            streams = [Stream() for _ in range(self.num_warps)]
            self.streams[gang.cta.ctaid] = streams
        return streams

    def note(self, warps: Any, *pairs: tuple[int, int]) -> None:
        """Add to what the current instruction names, for each of some warps."""
        for warp in warps:
            self.events[-1].setdefault(int(warp), []).extend(pairs)


_current: list[Recording] = []  # the recording that listens


def _lanes(g: Gang, mask: Any) -> np.ndarray:
    """(warps, 32): the lanes that take part."""
    full = np.ones(g.lanes, bool) if mask is None else np.broadcast_to(mask, g.lanes)
    return full.reshape(-1, 32)


def _by_warp(g: Gang, address: Any, mask: Any) -> Iterator[tuple[int, int, np.ndarray]]:
    """(warp, address, lanes) for each warp and each address that it names."""
    where = np.broadcast_to(address, g.lanes).reshape(-1, 32)
    for position, lanes in enumerate(_lanes(g, mask)):
        for at in np.unique(where[position][lanes]):
            yield int(g.warps[position]), int(at), lanes & (where[position] == at)


def _values(g: Gang, value: Any, warp: int, lanes: np.ndarray) -> np.ndarray:
    table = np.broadcast_to(value, g.lanes).reshape(-1, 32)
    return table[g.warps.tolist().index(warp)][lanes]


def _arrive(r: Recording, g: Gang, address: Any, count: Any, mask: Any) -> None:
    for warp, at, lanes in _by_warp(g, address, mask):
        r.note([warp], (r.of(g, at), int(_values(g, count, warp, lanes).astype(np.int64).sum())))


def _wait(r: Recording, g: Gang, address: Any, wanted: Any, by_parity: bool, mask: Any) -> None:
    for warp, at, lanes in _by_warp(g, address, mask):
        parity = int(_values(g, wanted, warp, lanes)[0]) & 1
        going_on = g.cta.mbarrier(at).parity == parity
        r.note([warp], (r.of(g, at), parity + FAILED * going_on))


def _transaction(r: Recording, g: Gang, address: Any, nbytes: Any, sign: int, mask: Any) -> None:
    _arrive(r, g, address, nbytes, mask)


def _named(r: Recording, g: Gang, index: Any, count: Any, mask: Any, *_: Any) -> None:
    everyone = 32 * g.cta.machine.num_warps
    for warp, number, lanes in _by_warp(g, index, mask):
        threads = everyone if count is None else int(_values(g, count, warp, lanes)[0])
        r.note([warp], (number, threads))


def _cluster(r: Recording, g: Gang, *_: Any) -> None:
    r.note(g.warps, (CLUSTER, 32))


def _copy_arrive(r: Recording, g: Gang, address: Any, noinc: bool, mask: Any) -> None:
    for warp, at, lanes in _by_warp(g, address, mask):
        r.note([warp], (r.of(g, at), int(lanes.sum())))


def _commit(r: Recording, g: Gang, address: Any, ranks: Any, mask: Any) -> None:
    """The mbarrier that a commit arrives on, or one in each CTA of a mask."""
    for lane in bulk_copy.issuing(g, mask):
        places = [bulk_copy.at_lane(address, lane)]
        if ranks is not None:
            named, offset = bulk_copy.at_lane(ranks, lane), places[0] & (1 << RANK_SHIFT) - 1
            places = [offset | rank << RANK_SHIFT for rank in range(16) if named >> rank & 1]
        r.note([g.warps[lane // 32]], *[(r.of(g, place), 1) for place in places])


def _nothing(r: Recording, g: Gang, *_: Any) -> None:
    """The names come from functions that are called inside."""


LISTENED: tuple[tuple[Any, str, Callable[..., None]], ...] = (
    (mbarrier, "run_arrive", _arrive),
    (mbarrier, "run_arrive_expect", _arrive),
    (mbarrier, "run_transaction", _transaction),
    (mbarrier, "run_wait", _wait),
    (sync, "run_arrive", _named),
    (sync, "run_sync", _named),
    (sync, "run_cluster_arrive", _cluster),
    (sync, "run_cluster_wait", _cluster),
    (cp_async, "run_arrive", _copy_arrive),
    (bulk_copy, "issue_load", _nothing),
    (bulk_copy, "issue_store", _nothing),
    (bulk_copy, "issue_flat_load", _nothing),
    (bulk_copy, "issue_flat_store", _nothing),
    (launch_control, "issue", _nothing),
    (products, "issue", _nothing),
    (tcgen05, "run_commit", _commit),
)


def _listening(plain: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    def listening(g: Gang, *args: Any) -> Any:
        if _current:
            _current[-1].events.append({})
            note(_current[-1], g, *args)
        return plain(g, *args)

    listening.__name__ = plain.__name__
    return listening


def _inner_count(plain: Callable[..., None]) -> Callable[..., None]:
    """bulk_copy.count: the bytes of one copy."""

    def count(g: Gang, lane: int, nbytes: int) -> None:
        if _current:
            _current[-1].note([g.warps[lane // 32]], (-1, nbytes))
        plain(g, lane, nbytes)

    return count


def _inner_told(plain: Callable[..., Any], canceled: bool) -> Callable[..., Any]:
    """told: the mbarrier that counts a load, whose bytes were noted just before."""

    def told(op: Any, g: Gang, signal: Any) -> Any:
        if _current:
            r = _current[-1]
            number = r.barrier(signal, signal_home(g, signal))
            for pairs in r.events[-1].values():
                if pairs and pairs[-1][0] == -1:
                    pairs[-1] = (number, pairs[-1][1])
            if canceled:
                r.note(g.warps[:1], (number, CANCEL_BYTES))
        return plain(op, g, signal)

    return told


def signal_home(g: Gang, signal: Any) -> tuple[int, int, int]:
    """The CTA of the cluster that an mbarrier lies in."""
    for cta in g.cta.peers:
        if signal in cta.mbarriers.values():
            return cta.ctaid
    return g.cta.ctaid


def _inner_claim(plain: Callable[..., None]) -> Callable[..., None]:
    """Product.claim: the shape of a product: (rows, columns), (CTAs, 1 if A is in TMEM)."""

    def claim(self: Any, op: Any, agent: Any) -> None:
        if _current:
            form, in_tmem = self.form, int(self.left is None)
            events = _current[-1].events[-1]
            events.setdefault(-1, []).extend([(form.rows, form.n), (form.group, in_tmem)])
        plain(self, op, agent)

    return claim


@contextmanager
def listening() -> Iterator[None]:
    """Programs that are loaded inside tell recordings what they synchronise on."""
    changed = [(module, name, getattr(module, name)) for module, name, _ in LISTENED]
    inner = [
        (bulk_copy, "count", _inner_count(bulk_copy.count)),
        (bulk_copy, "told", _inner_told(bulk_copy.told, False)),
        (launch_control, "told", _inner_told(launch_control.told, True)),
        (products.Product, "claim", _inner_claim(products.Product.claim)),
    ]
    changed += [(module, name, getattr(module, name)) for module, name, _ in inner]
    programs.load.cache_clear()
    for module, name, note in LISTENED:
        setattr(module, name, _listening(getattr(module, name), note))
    for module, name, function in inner:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, plain in changed:
            setattr(module, name, plain)
        programs.load.cache_clear()


class Recorder:
    """Has the interface of `trace.Trace`: a session's `trace` that keeps streams."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def watch(self, machine: Machine) -> "Recorder":
        launch = machine.launch
        recording = Recording(
            machine.num_warps,
            machine.program.flow,
            int(np.prod(launch.cluster)),
            launch.dynamic_smem + launch.static_smem,
        )
        self.recordings.append(recording)
        machine.program = _Watched(machine.program, recording)  # type: ignore[assignment]
        return self

    def close(self, roles: Any) -> None:
        """The end of a launch: forget what only recording needs."""
        for recording in self.recordings:
            recording.alive.clear()
            recording.numbers.clear()


class _Watched:
    """A program whose blocks report to a recording; everything else is the program's own."""

    def __init__(self, program: Any, recording: Recording) -> None:
        self._program = program
        self.plain = _Blocks(program.plain, recording, program)
        self.masked = _Blocks(program.masked, recording, program)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def _active(gang: Gang) -> list[int]:
    """The warps of a gang that run the block: where ways part, others only wait beside them."""
    if gang.mask is None:
        return gang.warps.tolist()
    return gang.warps[gang.mask.reshape(-1, 32).any(axis=1)].tolist()


class _Blocks:
    def __init__(self, functions: list[Any], recording: Recording, program: Any) -> None:
        self.functions, self.recording = functions, recording
        self.blocks = program.flow.blocks

    def __getitem__(self, pc: int) -> Any:
        return lambda gang, registers: self.run(gang, registers, pc)

    def run(self, gang: Gang, registers: Any, pc: int) -> int:
        recording, block = self.recording, self.blocks[pc]
        warps = _active(gang)
        streams = recording.stream(gang)
        recording.events = []
        _current.append(recording)
        try:
            return self.functions[pc](gang, registers)
        finally:
            _current.pop()
            events = recording.events
            again = block.spins or block.waits
            for warp in warps:
                stream = streams[warp]
                names = [tuple(e.get(warp, ()) or e.get(-1, ())) for e in events]
                if again and stream.blocks and stream.blocks[-1] == pc:
                    stream.names[-1] = names
                else:
                    stream.blocks.append(pc)
                    stream.names.append(names)
