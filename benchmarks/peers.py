"""The kernels compared, each behind one function (q, k, v, causal) -> out, all (b, s, h, d).

Run as a program, it serves one of them: a problem a line on stdin, a line of JSON on stdout.

    python -m benchmarks.peers NAME

Each kernel is served by a process of its own: upstream reads the architecture once a process, and
its helper library quack patches CuTe DSL for the whole of it. The benchmark asks them in turn, so
only one of them has work on the card at a time.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from .common import ROOT, Problem, load_kernel, time_cuda, time_host

OURS = "ours"
WARM_UP_S = 0.1  # before host times: what the host needs to speed up
# Upstream's sm_120 kernel is mma.sync and runs on sm_90 when compiled for it: the direct relative
# of ours. The number of SMs is what it sizes its grid by.
ENVIRONMENT = {
    "upstream-sm90": {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a"},
    "upstream-sm120": {
        "FLASH_ATTENTION_ARCH": "sm_120",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "CUTE_DSL_ARCH": "sm_90a",
    },
}


def ours() -> Callable:
    kernel = load_kernel()
    return lambda q, k, v, causal: kernel.flash_attn_func(q, k, v, causal=causal)


def sdpa(backend_name: str) -> Callable:
    """PyTorch's scaled_dot_product_attention, held to one backend."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, backend_name)

    def call(q, k, v, causal):
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                is_causal=causal, enable_gqa=q.shape[2] != k.shape[2],
            )  # fmt: skip
        return out.transpose(1, 2)

    return call


def upstream() -> Callable:
    from flash_attn.cute.interface import _flash_attn_fwd

    return lambda q, k, v, causal: _flash_attn_fwd(q, k, v, causal=causal)[0]


def fastflash() -> Callable:
    from fastflash_attention import fast_attention

    def call(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = fast_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return call


IMPLEMENTATIONS: dict[str, Callable[[], Callable]] = {
    OURS: ours,
    "torch-fa2": lambda: sdpa("FLASH_ATTENTION"),
    "torch-cudnn": lambda: sdpa("CUDNN_ATTENTION"),
    "upstream-sm90": upstream,
    "upstream-sm120": upstream,
    "fastflash": fastflash,
}
PEERS = tuple(name for name in IMPLEMENTATIONS if name != OURS)


def start_servers(
    names: Sequence[str], device: str = "cuda", module: str = "benchmarks.peers"
) -> list["Server"]:
    """All at once, since each takes seconds to import; those that cannot run are named."""
    servers = [Server(name, device, module) for name in names]
    running = [server for server in servers if server.ready()]
    for server in servers:
        if server.unavailable:
            print(f"not measured: {server.name}: {server.unavailable}")
    return running


def prepare(servers: Sequence["Server"], problems: Sequence[Problem]) -> None:
    """Let all servers compile at the same time, on short problems of the same kinds."""
    kinds = dict.fromkeys(replace(problem, batch=1, seqlen=512) for problem in problems)
    for server in servers:
        server.send(prepare=[asdict(kind) for kind in kinds])
    for server in servers:
        server.answer()


class Server:
    """A process that holds one implementation ready: `python -m module name`."""

    def __init__(self, name: str, device: str = "cuda", module: str = "benchmarks.peers"):
        self.name, self.device = name, device
        environment = os.environ | ENVIRONMENT.get(name, {})
        command = [sys.executable, "-m", module, name]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.unavailable: str | None = None

    def ready(self) -> bool:
        """Wait until it has imported what it needs; False with `unavailable` set if it cannot."""
        self.unavailable = self.answer().get("error")
        return self.unavailable is None

    def measure(self, problem: Any, milliseconds: float) -> dict[str, Any]:
        """{"ms": [...], "error_vs_fa2": ...} or {"error": ...}."""
        return self._ask(problem, milliseconds=milliseconds)

    def issue(self, problem: Problem, count: int, repeats: int) -> dict[str, Any]:
        """{"us": [...], "yardstick_us": [...]} or {"error": ...}; one figure a repeat.

        Host microseconds a warm call, and those of a PyTorch operation in the same process.
        """
        return self._ask(problem, count=count, repeats=repeats)

    def _ask(self, problem: Any, **how: Any) -> dict[str, Any]:
        request = {"problem": asdict(problem), "device": self.device, **how}
        self.send(**request)
        return self.answer()

    def send(self, **request: Any) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):  # anything else is a library talking
                return json.loads(line)
        return {"error": f"{self.name} ended with status {self._process.wait()}"}


def _measure(call: Callable, request: dict[str, Any]) -> dict[str, Any]:

    problem = Problem(**request["problem"])
    q, k, v = problem.tensors()
    out = call(q, k, v, problem.causal)
    reference = sdpa("FLASH_ATTENTION")(q, k, v, problem.causal)
    error = float((out.float() - reference.float()).abs().max())
    del out, reference
    samples = time_cuda(lambda: call(q, k, v, problem.causal), request["milliseconds"])
    return {"ms": samples, "error_vs_fa2": error}


def _issue(call: Callable, request: dict[str, Any]) -> dict[str, Any]:
    import torch

    device = request["device"]
    problem = Problem(**request["problem"])
    q, k, v = problem.tensors(device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def once():
        return call(q, k, v, problem.causal)

    once()
    timed = {"us": once, "yardstick_us": torch.empty(1, device=device).zero_}
    found: dict[str, list[float]] = {name: [] for name in timed}
    warm = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm:
        time_host(once, synchronize, request["count"])
    for _ in range(request["repeats"]):
        for name, function in timed.items():
            found[name].append(time_host(function, synchronize, request["count"]))
    return found


def _prepare(call: Callable, request: dict[str, Any]) -> dict[str, Any]:
    """Call once for each kind, whatever comes of it: a refusal is told when it is measured."""
    import torch

    for kind in request["prepare"]:
        problem = Problem(**kind)
        with contextlib.suppress(Exception):
            call(*problem.tensors(), problem.causal)
    torch.cuda.synchronize()
    return {"prepared": len(request["prepare"])}


def _answer(call: Callable, request: dict[str, Any]) -> dict[str, Any]:
    if "prepare" in request:
        return _prepare(call, request)
    return (_measure if "milliseconds" in request else _issue)(call, request)


def serve(implementation: Callable[[], Callable], name: str, answer: Callable) -> None:
    """Answer problems until stdin ends, each by `answer(implementation(), request)`."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    try:
        call = implementation()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"ready": name})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            say(answer(call, request))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {str(error)[:300]}"})


if __name__ == "__main__":
    serve(IMPLEMENTATIONS[sys.argv[1]], sys.argv[1], _answer)
