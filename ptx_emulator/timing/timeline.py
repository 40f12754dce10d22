"""One CTA of a replay as a trace for Perfetto (or chrome://tracing), a microsecond a cycle.

A track a warp: code by its most telling pipe, and the waits between; a track a unit of each SM:
products of the tensor core, tensor memory's accesses of the four schedulers together.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .lower import KINDS
from .replay import TENSOR_UNIT, TMEM_UNIT, Result, Streams

TELLING = ("tensor", "mufu", "fma", "alu", "lsu", "none")
WAITS = ("wait", "named_sync", "cluster_wait", "tmem_wait", "store_wait", "wgmma_wait", "copy_wait")
SHORTEST_WAIT = 30  # cycles; shorter ones are latencies
STRETCH = 24  # instructions of a slice of code
UNIT_TRACK = 1000
UNIT_NAMES = {TENSOR_UNIT: "tensor core", TMEM_UNIT: "tensor memory"}


def write(path: Path, streams: Streams, result: Result) -> None:
    """Write the trace of a traced replay."""
    events = [*_warps(streams, result), *_units(result)]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}) + "\n")


def _name(process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": name}}


def _slice(process: int, track: int, name: str, start: float, end: float) -> dict[str, Any]:
    times = {"ts": round(start, 1), "dur": round(max(end - start, 0.0), 1)}
    return {"ph": "X", "name": name, "pid": process, "tid": track, **times}


def _warps(streams: Streams, result: Result) -> list[dict[str, Any]]:
    assert result.issue is not None, "a timeline needs a traced replay"
    events = []
    for row, (cta, warp) in enumerate(zip(streams.warp_cta, streams.warp_number, strict=True)):
        process = int(cta)
        events.append(_name(process, int(warp), f"warp {warp}"))
        a, b = streams.warp_start[row : row + 2]
        kinds = streams.ops["kind"][streams.code[a:b]]
        real = np.flatnonzero(kinds != KINDS.index("free"))
        pipes = [streams.lines[op][2] for op in streams.code[a:b][real]]
        issued = [*result.issue[a:b][real], result.warp_end[row]]
        names = [KINDS[kind] for kind in kinds[real]]
        first = 0
        for at, name in enumerate(names):
            waited = issued[at + 1] - issued[at]
            stops = name in WAITS and waited >= SHORTEST_WAIT
            if stops or at - first >= STRETCH:
                told = next(p for p in TELLING if p in pipes[first : at + 1])
                events.append(_slice(process, int(warp), told, issued[first], issued[at]))
                first = at + 1 if stops else at
            if stops:
                line = streams.lines[streams.code[a:b][real[at]]][0]
                label = f"wait: {name}, PTX line {line}"
                events.append(_slice(process, int(warp), label, issued[at], issued[at + 1]))
    return events


def _units(result: Result) -> list[dict[str, Any]]:
    events = []
    for unit, sm, start, end in result.units:
        track = UNIT_TRACK + int(unit)
        events.append(_slice(int(sm), track, UNIT_NAMES[int(unit)], start, end))
    for sm in range(len(result.busy)):
        for unit, name in UNIT_NAMES.items():
            events.append(_name(sm, UNIT_TRACK + unit, name))
    return events
