"""Where the fuzzer's calls run: the cpu variant, a compiled kernel in the emulator, or a card."""

import importlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from .generate import Limits

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = 8


class Backend(Protocol):
    """A loaded package, the device of its tensors, and how much of it one case may take."""

    package: ModuleType
    device: torch.device
    limits: Limits
    twice: bool  # whether a second run is cheap

    def running(self, value: Any) -> Any:
        """A context in which the package's functions run on this back end."""

    def num_kernels(self) -> int:
        """How many kernels have been compiled so far."""


def load_package() -> ModuleType:
    """The kernel as get_kernel loads it, from build/."""
    from kernels import get_local_kernel

    return get_local_kernel(ROOT / "build")


def part(package: ModuleType, name: str) -> ModuleType:
    """A module of the loaded package."""
    return importlib.import_module(f"{package.__name__}.{name}")


@dataclass
class Direct:
    """The package as it is, on tensors of a device."""

    package: ModuleType
    device: torch.device
    limits: Limits
    twice: bool = True

    @contextmanager
    def running(self, value: Any) -> Iterator[None]:
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def num_kernels(self) -> int:
        return part(self.package, "flash_attn4_cute.compiler").compiled.num_made


@dataclass
class Emulated:
    """The CUDA variant on CPU tensors, its launches executed by the emulator."""

    package: ModuleType
    arch: str
    limits: Limits
    device: torch.device = torch.device("cpu")
    twice: bool = False

    @contextmanager
    def running(self, value: Any) -> Iterator[None]:
        from tests.emulator.on_cards import card

        with card(self.package, self.arch, zlib.crc32(repr(value).encode()) % SCHEDULES):
            yield

    def num_kernels(self) -> int:
        return part(self.package, "flash_attn4_cute.compiler").compiled.num_made


def open_backend(name: str, arch: str) -> Backend:
    """The back end of this name; loads the package."""
    if name == "emulator":
        import ptx_emulator

        ptx_emulator.bootstrap()
        limits = Limits(pairs=60_000, length=300, rows=12, splits=(2, 3, 7))
        return Emulated(load_package(), arch.replace("sm_", "sm").replace("sm", "sm_"), limits)
    if name == "cuda":
        limits = Limits(pairs=8_000_000, length=2000, rows=48)
        return Direct(load_package(), torch.device("cuda"), limits)
    return Direct(load_package(), torch.device("cpu"), Limits(pairs=400_000, length=600, rows=24))
