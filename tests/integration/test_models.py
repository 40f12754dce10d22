"""Models whose attention does more than Llama's: every kind of batch, against eager attention."""

from __future__ import annotations

import pytest
import torch

from ..conftest import REPO_ID
from .conftest import randomise, use

transformers = pytest.importorskip("transformers")

LENGTH, PADDING, WINDOW, LAYERS = 24, 7, 6, 2
PIECES = (9, 1, 14)  # sequences packed into one row
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    # RMS norms of queries and keys
    "Qwen3": SHAPE,
    # softcap, and a window in every other layer
    "Gemma2": SHAPE | WINDOWED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    # windows, norms and two bases of rotation
    "Gemma3Text": SHAPE | WINDOWED | {"query_pre_attn_scalar": 16},
    # a window in all layers
    "Mistral": SHAPE | {"sliding_window": WINDOW},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name = request.param
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    made = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    return randomise(made)


def tokens():
    return torch.randint(1, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, implementation, **inputs):
    use(model, implementation)
    return model(**inputs).logits


@pytest.mark.parametrize("padding", [0, PADDING], ids=["dense", "padded"])
def test_batches(model, calls, padding):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :padding] = 0
    inputs = {"input_ids": tokens() * mask, "attention_mask": mask}
    counts = mask == 1
    expected = logits(model, "eager", **inputs)[counts]
    torch.testing.assert_close(logits(model, REPO_ID, **inputs)[counts], expected)
    assert calls == ["flash_attn_varlen_func" if padding else "flash_attn_func"] * LAYERS


def test_packed_sequences(model, calls):
    """Several in one row, told apart by their positions alone."""
    ids = tokens()[:1]
    positions = torch.cat([torch.arange(n) for n in PIECES])[None]
    expected = [logits(model, "eager", input_ids=piece) for piece in ids.split(PIECES, dim=1)]
    ours = logits(model, REPO_ID, input_ids=ids, position_ids=positions)
    torch.testing.assert_close(ours, torch.cat(expected, dim=1))
    assert calls == ["flash_attn_varlen_func"] * LAYERS


def test_continuous_batching(model, calls):
    """Prompts of different lengths in one cache; windowed layers keep their last pages only."""
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 127, "pad_token_id": 0}
    prompts = [tokens()[0, :n].tolist() for n in (3, 11, 20)]
    use(model, "eager")
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), **options)[0]
        expected.append(out[len(prompt) :].tolist())
    use(model, REPO_ID)
    results = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(**options),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=32, max_batch_tokens=64, page_size=16, max_blocks_per_request=4
        ),
    )
    found = sorted(results.values(), key=lambda result: len(result.prompt_ids))
    assert [result.generated_tokens for result in found] == expected
    assert set(calls) == {"flash_attn_varlen_func"}
