"""Continuous batching: requests of different lengths share one paged cache.

transformers decodes through `flash_attn_with_kvcache` and block tables only where the kernel's name
matches `.*flash.*[23]` and CUDA is there; otherwise it gathers the cache and calls
`flash_attn_varlen_func`. So the name, or a pinned revision with a 2 or 3 in it, decides the path.
"""

from __future__ import annotations

import functools

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


# Pinned revisions: 40 digits of which none is a 2 or a 3, and with one of them.
PINNED, PINNED_PAGED = "0145789abc" * 4, "0145789ab3" + "0145789abc" * 3


@pytest.mark.parametrize("implementation", [REPO_ID, f"{REPO_ID}@{PINNED}"])
def test_gathered_cache(model, prompts, calls, monkeypatch, implementation):
    """With CUDA there too, the name alone keeps transformers from block tables."""
    monkeypatch.setattr(batching, "torch", PretendCuda())
    assert batched(model, prompts, implementation) == one_by_one(model, prompts)
    assert set(calls) == {"flash_attn_varlen_func"}


@pytest.mark.parametrize(
    "implementation", [f"{REPO_ID}:fa3", f"{REPO_ID}@v2", f"{REPO_ID}@{PINNED_PAGED}"]
)
def test_paged_cache(model, prompts, calls, monkeypatch, implementation):
    monkeypatch.setattr(batching, "torch", PretendCuda())
    assert batched(model, prompts, implementation) == one_by_one(model, prompts)
    assert "flash_attn_with_kvcache" in calls


def test_padding_rows_of_a_graph(fa4, model, prompts, monkeypatch, recorder):
    """transformers pads a captured decoding step with rows of length -1 and pages -1.

    It does so on CUDA only; here each of its calls is repeated with such rows and must give the
    same: the other rows bit for bit, zeros, and an unchanged cache.
    """
    monkeypatch.setattr(batching, "torch", PretendCuda())
    plain = fa4.flash_attn_with_kvcache
    repeated = []

    @functools.wraps(plain)
    def with_padding(q, k_cache, v_cache, k, v, **options):
        # Keys and values are pages of one buffer, and the two caches are views that overlap.
        buffer = k_cache.new_empty(0).set_(k_cache.untyped_storage())
        copy = buffer.clone()
        caches = [
            copy.as_strided(x.shape, x.stride(), x.storage_offset()) for x in (k_cache, v_cache)
        ]
        out = plain(q, k_cache, v_cache, k, v, **options)
        rows = [torch.cat([x, x[:1].expand(2, *x.shape[1:])]) for x in (q, k, v)]
        table = "block_table" if "block_table" in options else "page_table"
        for name in (table, "cache_seqlens"):
            given = options[name]
            padding = torch.full((2, *given.shape[1:]), -1, dtype=given.dtype)
            options[name] = torch.cat([given, padding])
        padded = plain(rows[0], *caches, *rows[1:], **options)
        assert padded[:-2].equal(out) and padded[-2:].eq(0).all()
        assert copy.equal(buffer)
        repeated.append(len(q))
        return out

    monkeypatch.setattr(fa4, "flash_attn_with_kvcache", with_padding)
    # A name of its own, since transformers keeps a kernel's functions once it has loaded them.
    assert batched(model, prompts, f"{REPO_ID}@v3") == one_by_one(model, prompts)
    assert repeated
