"""Counters and traces of a program of which every number is known."""

import itertools
import json

import numpy as np

import ptx_emulator
from ptx_emulator import counters
from ptx_emulator.launch.host import Launch
from ptx_emulator.trace import Trace

from .programs import HEADER, PROLOGUE
from .test_findings import LOAD, WAIT, init

# Warps 0 and 1 do arithmetic 5 times; warp 2 lets TMA load 128 bytes and waits for them.
BODY = f"""{init(1)}setp.eq.b32 %p7, %r3, 2;
@%p7 bra $load;
mov.b32 %r20, 5;
$again:
ex2.approx.ftz.f32 %r21, %r20;
fma.rn.f32 %r22, %r21, %r21, %r21;
fma.rn.f32 %r22, %r21, %r21, %r21;
add.s32 %r20, %r20, -1;
setp.ne.b32 %p8, %r20, 0;
@%p8 bra $again;
st.shared.v4.b32 [%r1+1024], {{%r1, %r1, %r1, %r1}};
bra $end;
$load:
{LOAD.replace("{0}", "").replace("BYTES", "128").replace("%r2, 0", "%r2, 64")}{WAIT.format("", 0)}
$end:
"""


def launched(text: str, warps: int, **options):
    data = np.zeros(256, np.int32)
    launch = Launch(
        kernel="program",
        ptx=HEADER + PROLOGUE + text + "\nret;\n}\n",
        grid=(2, 1, 1),
        block=(32 * warps, 1, 1),
        cluster=(1, 1, 1),
        dynamic_smem=4096,
        static_smem=0,
        stream=0,
        params=(data.ctypes.data.to_bytes(8, "little"),),
        attributes=(),
    )
    with ptx_emulator.session("sm_120a", **options) as emulator:
        emulator.allocations.add(data.ctypes.data, data.nbytes, data)
        emulator.launch(launch)
    return emulator.runs[0]


def test_known_numbers():
    """Two CTAs of three warps: each count is what the text says."""
    run = launched(BODY, 3)
    first, second = run.roles
    assert (first.name, first.warps) == ("softmax", [0, 1])
    assert first.slots["mufu"] == 2 * 2 * 5 and first.slots["fma"] == 2 * 2 * 10
    assert first.bytes == {"shared": 2 * 2 * 512, "tmem": 0, "tma": 0}
    assert (second.name, second.warps) == ("load", [2])
    assert second.slots["tma"] == 2 and second.bytes["tma"] == 2 * 128
    assert second.slots["mufu"] == 0
    assert second.blocked >= 2 and second.waits >= 4
    assert sum(sum(role.slots.values()) for role in run.roles) <= run.instructions
    text = counters.as_table(run.roles, tiles=2)
    assert "softmax" in text and " 10.0" in text


def test_trace(tmp_path):
    """One track a warp, whose slices do not overlap; the wait and the copy are visible."""
    trace, file = Trace(), tmp_path / "trace.json"
    run = launched(BODY, 3, trace=trace, schedule=5)
    trace.write(file)
    events = json.loads(file.read_text())["traceEvents"]
    named = [e for e in events if e["name"] == "thread_name"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in named}
    assert names[0, 0] == "warp 0 softmax" and names[1, 2] == "warp 2 load"
    slices, total = [e for e in events if e["ph"] == "X"], 0
    for track in itertools.product((0, 1), range(3)):
        own = [e for e in slices if (e["pid"], e["tid"]) == track]
        own.sort(key=lambda e: (e["ts"], e["dur"]))
        for before, after in itertools.pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"]
        total += sum(e["dur"] for e in own if not e["name"].startswith("wait"))
    assert total == run.instructions
    for process in (0, 1):
        waits = {e["tid"] for e in slices if e["pid"] == process and "parity 0 of" in e["name"]}
        assert waits == {2}, "warp 2 waits for its load"
        own = [e for e in events if e["pid"] == process and e["ph"] in "be"]
        assert [(e["name"], e["ph"]) for e in own] == [("bulk load", "b"), ("bulk load", "e")]
        assert own[0]["ts"] < own[1]["ts"]
