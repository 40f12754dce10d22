"""Continuous batching: requests of different lengths share one paged cache.

transformers decodes through `flash_attn_with_kvcache` and block tables only where the kernel's name
matches `.*flash.*[23]` and CUDA is there; otherwise it gathers the cache and calls
`flash_attn_varlen_func`. So the name, or a pinned revision with a 2 or 3 in it, decides the path.
"""

from __future__ import annotations

import pytest
import torch

from ..conftest import REPO_ID
from .conftest import randomise, use

transformers = pytest.importorskip("transformers")
batching = pytest.importorskip("transformers.generation.continuous_batching.initialization")

PROMPT_LENGTHS = (5, 17, 33)
GENERATION = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 127, "pad_token_id": 0}


class PretendCuda:
    """torch, but for `torch.cuda.is_available()`: the paged path is chosen on a CPU too."""

    class cuda:
        @staticmethod
        def is_available() -> bool:
            return True

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=127,
        pad_token_id=0,
    )
    return randomise(transformers.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 120, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def one_by_one(model, prompts):
    """Greedy continuations of each prompt on its own, with eager attention."""
    use(model, "eager")
    outputs = [model.generate(torch.tensor([prompt]), **GENERATION)[0] for prompt in prompts]
    return [output[len(prompt) :].tolist() for output, prompt in zip(outputs, prompts, strict=True)]


def batched(model, prompts, implementation):
    """Greedy continuations by `generate_batch`."""
    use(model, implementation)
    results = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(**GENERATION),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=128, page_size=16, max_blocks_per_request=4
        ),
    )
    by_length = sorted(results.values(), key=lambda result: len(result.prompt_ids))
    return [result.generated_tokens for result in by_length]


def test_gathered_cache(model, prompts, calls):
    assert batched(model, prompts, REPO_ID) == one_by_one(model, prompts)
    assert set(calls) == {"flash_attn_varlen_func"}


@pytest.mark.parametrize("implementation", [f"{REPO_ID}:fa3", f"{REPO_ID}@v2"])
def test_paged_cache(model, prompts, calls, monkeypatch, implementation):
    monkeypatch.setattr(batching, "torch", PretendCuda())
    assert batched(model, prompts, implementation) == one_by_one(model, prompts)
    assert "flash_attn_with_kvcache" in calls
