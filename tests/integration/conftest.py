"""What the tests with transformers share: the kernel's name there, and a record of its calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from ..conftest import BUILD, REPO_ID

# Names under which transformers asks for a FlashAttention of its own choice.
ALIASES = ("kernels-community/flash-attn4", "kernels-community/vllm-flash-attn3")
ENTRY_POINTS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


@pytest.fixture(autouse=True, scope="package")
def usable_transformers() -> None:
    """Skip this directory where transformers is missing or would refuse to load a kernel."""
    pytest.importorskip("transformers")
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("this release of transformers does not accept this release of kernels")


@pytest.fixture(scope="package")
def recorder(fa4: ModuleType) -> Iterator[list[str]]:
    """The names of the kernel's functions, in the order in which transformers calls them."""
    calls: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        @functools.wraps(function)  # transformers reads the signature
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(fa4, name) for name in ENTRY_POINTS}
    for name, function in originals.items():
        setattr(fa4, name, recorded(name, function))
    yield calls
    for name, function in originals.items():
        setattr(fa4, name, function)


@pytest.fixture
def calls(recorder: list[str]) -> list[str]:
    """The calls of one test."""
    recorder.clear()
    return recorder


@pytest.fixture
def redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the names that transformers falls back to mean our build as well."""
    names = (REPO_ID, *ALIASES)
    monkeypatch.setenv("LOCAL_KERNELS", ":".join(f"{name}={BUILD}" for name in names))


def use(model: Any, implementation: str = REPO_ID) -> None:
    """Switch a model's attention, as a user does."""
    model.set_attn_implementation(implementation, allow_all_kernels=True)


def randomise(model: Any, std: float = 0.2) -> Any:
    """Give a model weights large enough that attention matters to its output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()
