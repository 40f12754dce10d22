"""The command line: its report, its exit status, and its refusals."""

import json

import pytest

from ptx_emulator.cli.main import OK, REFUSED, main

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
        ("--arch sm100a", "no kernel of this repository"),
        ("--arch sm13", "not emulated"),
        ("--num-splits 2", "num_splits=2"),
        ("--page-size 64", "page_table"),
        ("--softcap 10", "softcap=10"),
        ("--sink", "learnable_sink"),
        ("--head-dim-v 64", "head_dim_v=64"),
        ("--heads 3 --kv-heads 2", "no multiple"),
    ],
)
def test_refusals(capsys, arguments, reason):
    status, report = run(capsys, *arguments.split())
    assert status == REFUSED and not report["ok"] and reason in report["refused"]
