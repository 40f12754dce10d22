"""The plugin in vLLM itself, on a CPU: `make test-vllm` makes the environment and runs this.

vLLM's CPU platform has one attention backend, CPU_ATTN, and chooses it whatever is asked for; the
plugin takes its place by FLASH_ATTN_4_REPLACES. What runs then is all of the plugin but for the one
operator of vLLM's that writes a cache on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# Read when vLLM is imported: one process, a small cache, nothing sent anywhere.
os.environ.update(
    FLASH_ATTN_4_REPLACES="CPU_ATTN",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # two servers would be bound to the same core
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytest.importorskip("flash_attn_4_vllm", reason="needs the plugin integrations/vllm installed")

VOCABULARY = 512
Generate = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def kernel(build: Path) -> ModuleType:
    """The kernel, as the plugin loads it."""
    from flash_attn_4_vllm.kernel import kernel

    return kernel()


@pytest.fixture
def calls(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of each call that the plugin makes into the kernel."""
    made: list[dict[str, Any]] = []
    original = kernel.flash_attn_varlen_func

    @functools.wraps(original)
    def recorded(*args: Any, **keywords: Any) -> Any:
        made.append(keywords)
        return original(*args, **keywords)

    monkeypatch.setattr(kernel, "flash_attn_varlen_func", recorded)
    return made


@pytest.fixture
def engine(kernel: ModuleType) -> Iterator[Callable[..., Any]]:
    """Makes vLLM engines in this process: engine(directory, **options)."""
    from vllm import LLM

    engines = []

    def make(directory: Path, **options: Any) -> Any:
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "block_size": 16,
            "disable_log_stats": False,
        }
        engines.append(LLM(str(directory), **defaults | options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()


def tokens(count: int, seed: int = 1) -> list[int]:
    """A prompt of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY - 2, (count,), generator=generator).tolist()


def served(llm: Any, prompts: list[list[int]], max_tokens: int = 12) -> list[Any]:
    """vLLM's greedy completions, in the order of the prompts."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(requests, greedy, use_tqdm=False)


def completions(outputs: list[Any]) -> list[list[int]]:
    """The tokens in what `served` returns."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(model: Any, prompts: list[list[int]], max_tokens: int = 12) -> list[list[int]]:
    """transformers' greedy completions of each prompt on its own, with eager attention."""
    results = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        results.append(out[0, len(prompt) :].tolist())
    return results


def save(model: Any, directory: Path) -> Any:
    """Give a model weights large enough that attention matters, save it, and return it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.eval().save_pretrained(directory)
    return model
