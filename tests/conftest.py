"""What every test shares: the build, the kernel as users load it, and the device under test.

The machine that runs these tests need not have every optional package or a GPU; what is missing is
skipped with its reason. Nothing here needs make or pip: `python -m pytest` is enough.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# A package that was built before, with precompiled kernels, is tested as it is.
GIVEN = os.environ.get("FLASH_ATTN_4_PACKAGE")
BUILD = Path(GIVEN).resolve() if GIVEN else ROOT / "build"
REPO_ID = "flash-attn-4-org/flash-attn-4"

# No test may reach a network; read by huggingface_hub when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A user's own setting must not decide which kernel is tested.
os.environ["LOCAL_KERNELS"] = f"{REPO_ID}={BUILD}"
# Nor may tests write into a user's cache of kernels; theirs serves all processes of a run.
if not GIVEN:
    os.environ["FLASH_ATTN_4_CACHE"] = str(ROOT / ".cache" / "kernels")
    os.environ.pop("FLASH_ATTN_4_JIT", None)

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave some directories to runs of their own.

    tests/emulator puts an emulated CUDA runtime under CuTe DSL; the plugins of serving engines are
    tested in an environment that has these (`make test-vllm`).
    """
    for name in ("emulator", "vllm", "sglang"):
        asked_for = any(f"tests/{name}" in argument for argument in config.args)
        if collection_path == ROOT / "tests" / name and not asked_for:
            return True
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes `device` on the CPU and, marked gpu, on CUDA; what is gpu, only there."""
    if "device" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("gpu"):
        devices = ["cuda"]
    else:
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
    metafunc.parametrize("device", devices, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where there is none; else keep together what shares a kernel.

    With `-n N --dist loadgroup` each kernel is then compiled by one process.
    """
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if hasattr(case, "kernel_key"):
            item.add_marker(pytest.mark.xdist_group(repr(case.kernel_key)))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors live; see `pytest_generate_tests`."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers at each run of a test, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build() -> Path:
    """build/, assembled from the present sources once a test run, however many processes it has.

    Without precompiled kernels; $FLASH_ATTN_4_PACKAGE names a finished build to test instead.
    """
    if GIVEN:
        return BUILD
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"process {os.getpid()}")
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if lock.read() != run:
            command = [sys.executable, "-m", "flash_attn4_cute.build"]
            subprocess.run(command, cwd=ROOT, check=True)
            lock.truncate(0)
            lock.write(run)
    return BUILD


@pytest.fixture(scope="session")
def fa4(build: Path) -> ModuleType:
    """The kernel, loaded the way users load it."""
    kernels = pytest.importorskip("kernels", reason="the kernel is loaded by the package kernels")
    return kernels.get_kernel(REPO_ID, version=1)
