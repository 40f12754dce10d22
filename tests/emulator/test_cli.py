"""The command line: its report, its exit status, and its refusals."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from ptx_emulator.cli.main import OK, REFUSED, WRONG, main

KEYS = {"ok", "max_abs_err", "limit", "lse_err", "instructions", "seconds", "schedule"}


def run(capsys, *arguments):
    status = main(list(arguments))
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_report(capsys):
    arguments = "--arch sm120a --dtype bf16 --heads 2 --kv-heads 1 --seqlen-q 70 --seqlen-k 90"
    status, report = run(capsys, *arguments.split(), "--causal", "--schedule", "3", "--counters")
    # 70 query rows are the work of three warps.
    (launch,) = report["counters"]
    names = {role["name"]: len(role["warps"]) for role in launch["roles"]}
    assert names["compute"] == 3 and names["load"] == 1
    assert status == OK and report["ok"] and report.keys() >= KEYS
    assert 0 < report["max_abs_err"] <= report["limit"] and report["schedule"] == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--arch sm100a --head-dim 264", "head_dim=264"),
        ("--arch sm13", "not emulated"),
        ("--heads 3 --kv-heads 2", "no multiple"),
    ],
)
def test_refusals(capsys, arguments, reason):
    status, report = run(capsys, *arguments.split())
    assert status == REFUSED and not report["ok"] and reason in report["refused"]


SMALL = "--seqlen-q 33 --seqlen-k 150 --head-dim 64 --heads 2 --kv-heads 1"


@pytest.mark.parametrize(
    "arguments",
    [
        "--window 20 5 --dtype fp16",
        "--window -1 3",
        "--varlen --batch 3 --causal",
        "--page-size 64 --batch 3 --varlen",
        "--num-splits 2",
        "--softcap 10 --sink",
        "--head-dim-v 72",
    ],
)
def test_options(capsys, arguments):
    """Each option reaches the kernel: the exact answer of the report's oracle depends on it."""
    status, report = run(capsys, *SMALL.split(), *arguments.split())
    assert status == OK and report["ok"], report
    assert 0 < report["max_abs_err"] <= report["limit"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--sink --page-size 64 --batch 2",
        "--softcap 10 --varlen --batch 3 --causal",
        "--num-splits 2 --window 100 0",
        "--head-dim 192 --head-dim-v 128",
    ],
)
def test_upstream_options(capsys, arguments):
    pytest.importorskip("flash_attn", reason="upstream flash-attn-4 is not installed")
    options = f"--arch sm100a --kernel upstream {SMALL} --head-dim 128 {arguments}"
    status, report = run(capsys, *options.split())
    assert status == OK and report["ok"], report


def test_upstream_refuses(capsys):
    pytest.importorskip("flash_attn", reason="upstream flash-attn-4 is not installed")
    options = f"--arch sm120a --kernel upstream {SMALL} --page-size 64"
    status, report = run(capsys, *options.split())
    assert status == REFUSED and "upstream refuses" in report["refused"]


def test_trace(capsys, tmp_path):
    file = tmp_path / "trace.json"
    status, report = run(capsys, *SMALL.split(), "--trace", str(file))
    events = json.loads(file.read_text())["traceEvents"]
    assert status == OK and report["trace"] == str(file)
    assert any(event["name"].startswith("wait: parity") for event in events)
    assert any(event["name"] == "TMA load" and event["ph"] == "e" for event in events)


def test_features(capsys):
    """Each feature under its schedules, append and merge among them; a wrong one is named."""
    arguments = "--arch sm121a --features append_paged,combine --schedules 2"
    status, report = run(capsys, *arguments.split())
    assert status == OK and report["features"] == 2 and report["runs"] == 4
    assert report["ok"] and report["instructions"] and not report["wrong"]


def test_a_wrong_feature_is_reported(capsys, monkeypatch):
    from ptx_emulator.cli import sweep

    def off_by_one(*question):
        out, lse = sweep.combine(*question)
        return out, lse + 1

    wrong = sweep.Feature("wrong", next(sweep.features()).case, off_by_one)
    monkeypatch.setattr(sweep, "features", lambda: iter([wrong]))
    status, report = run(capsys, *["--arch", "sm120a", "--features", "--schedules", "1"])
    assert status == WRONG and not report["ok"] and report["wrong"][0]["feature"] == "wrong"


def compiler_directory():
    from cutlass.cutlass_dsl import CuTeDSL

    return CuTeDSL._get_dsl().envar.dump_dir


def test_forked_processes_compile_apart():
    """Names of files repeat: two processes in one directory would read each other's kernels."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        theirs = pool.submit(compiler_directory).result()
    assert theirs != compiler_directory() and Path(theirs).parent == Path(compiler_directory())
