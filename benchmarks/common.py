"""What every benchmark shares: problems, work in FLOPs, timing by CUDA events, JSON, a table."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPO_ID = "flash-attn-4-org/flash-attn-4"
# A package that was built before, with precompiled kernels.
GIVEN = os.environ.get("FLASH_ATTN_4_PACKAGE")

L2_FLUSH_BYTES = 256 << 20  # more than the L2 of any card here


@dataclass(frozen=True)
class Problem:
    """One prefill: b sequences of s tokens, h query heads over h_kv key heads."""

    batch: int
    seqlen: int
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        mask = "causal" if self.causal else "dense"
        heads = f"h{self.heads}/{self.heads_kv}"
        return f"b{self.batch} s{self.seqlen} {heads} d{self.head_dim} {mask} {self.dtype}"

    @property
    def flops(self) -> int:
        """Multiply-adds of both products, two FLOPs each; a causal mask counts as half."""
        both = 4 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return both // 2 if self.causal else both

    def tensors(self, device: str = "cuda"):
        """q (b, s, h, d), k and v (b, s, h_kv, d) of normal noise, the same in every process."""
        import torch

        gen = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def normal(heads: int):
            shape = (self.batch, self.seqlen, heads, self.head_dim)
            return torch.randn(shape, generator=gen, device=device, dtype=dtype)

        return normal(self.heads), normal(self.heads_kv), normal(self.heads_kv)


# (batch, seqlen, heads, heads_kv, head_dim): the shapes that the project's bars are stated for.
PREFILL_SHAPES = (
    (1, 8192, 32, 8, 128),
    (8, 1024, 32, 8, 128),
    (1, 32768, 32, 8, 128),
    (2, 8192, 32, 32, 64),
    (16, 1024, 32, 8, 64),
    (1, 8192, 32, 8, 96),
    (1, 8192, 16, 4, 256),
)


def prefill_grid(dtype: str = "bfloat16") -> list[Problem]:
    """Every shape, dense and causal."""
    return [
        Problem(*shape, causal=causal, dtype=dtype)
        for shape in PREFILL_SHAPES
        for causal in (False, True)
    ]


def time_cuda(call: Callable[[], Any], milliseconds: float) -> list[float]:
    """Milliseconds of single launches by CUDA events, L2 flushed before each, for about so long."""
    import torch

    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return time_events(call, milliseconds, flush.zero_)


def time_events(
    call: Callable[[], Any], milliseconds: float, before: Callable[[], Any] = lambda: None
) -> list[float]:
    """Milliseconds of `call` by CUDA events, `before` outside of them, for about so long."""
    import torch

    def one():
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    for _ in range(3):
        start, end = one()
    torch.cuda.synchronize()
    count = max(5, min(1000, int(milliseconds / max(start.elapsed_time(end), 1e-3))))
    pairs = [one() for _ in range(count)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def time_host(call: Callable[[], Any], synchronize: Callable[[], Any], count: int) -> float:
    """Microseconds that the host needs to issue one call, the device never waited for."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed / count * 1e6


def build_kernel() -> None:
    """Assemble build/, unless FLASH_ATTN_4_PACKAGE names a package that is finished."""
    if not GIVEN:
        subprocess.run([sys.executable, "-m", "flash_attn4_cute.build"], cwd=ROOT, check=True)


def load_kernel():
    """The kernel as users load it, from build/ or the package that is given."""
    os.environ["LOCAL_KERNELS"] = f"{REPO_ID}={GIVEN or ROOT / 'build'}"
    from kernels import get_kernel

    return get_kernel(REPO_ID, version=1)


def environment() -> dict[str, Any]:
    """When, on what card, with what versions, by what command."""
    import torch

    names = ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "kernels", "flash-attn-4", "triton")
    versions = {}
    for name in names:
        for distribution in (name, f"{name}-libs-base"):  # CuTe DSL may lie there without its shell
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions.setdefault(name, metadata.version(distribution))
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "card": card.name if card else "no GPU",
        "capability": f"{card.major}.{card.minor}" if card else None,
        "sms": card.multi_processor_count if card else None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "command": "python -m " + " ".join([_module_name(), *sys.argv[1:]]),
    }


def _module_name() -> str:
    return "benchmarks." + Path(sys.argv[0]).stem


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _driver() -> str | None:
    return _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    return _output_of("git", "rev-parse", "--short", "HEAD")


def write_json(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """environment, rows and whatever else, readable by people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), **more, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be."""
    widths = [max(len(line[n]) for line in [header, *rows]) for n in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if n == 0 else cell.rjust(width)
                  for n, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in [header, *rows]
    ]  # fmt: skip
    return "\n".join(lines)
