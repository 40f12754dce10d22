"""The programs in examples/, as a reader runs them. vllm_generate.py: tests/vllm/test_server.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ..conftest import ROOT

pytest.importorskip("gguf")


@pytest.mark.parametrize(
    "command, last",
    [(["hub.py"], "hub: ok"), (["generate.py", "--max-new-tokens", "4"], "demo: ok variant=")],
    ids=["hub", "generate"],
)
def test_example(build, command, last):
    program = [sys.executable, ROOT / "examples" / command[0], *command[1:]]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(last)
