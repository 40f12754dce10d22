"""gpt-oss: attention sinks, and a sliding window in every other layer.

transformers replaces any name containing "flash" that is not on the model's own list by the first
name on that list, with a warning. Two ways lead to this kernel all the same, and both are tested.
"""

from __future__ import annotations

import pytest
import torch

from ..conftest import REPO_ID
from .conftest import randomise, use

transformers = pytest.importorskip("transformers")

LENGTH, WINDOW = 20, 8


@pytest.fixture
def model():
    config = transformers.GptOssConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
    )
    return randomise(transformers.GptOssForCausalLM(config))


@torch.inference_mode()
def logits(model, implementation):
    ids = torch.randint(0, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    use(model, implementation)
    return model(ids).logits


def test_by_the_name_of_the_family(model, calls, redirected):
    """`flash_attention_4` resolves to a kernel repository, which LOCAL_KERNELS redirects."""
    torch.testing.assert_close(logits(model, "flash_attention_4"), logits(model, "eager"))
    assert calls == ["flash_attn_func"] * 2


def test_by_our_name_once_it_is_listed(model, calls, redirected, monkeypatch):
    base = transformers.models.gpt_oss.modeling_gpt_oss.GptOssPreTrainedModel
    listed = [*base._compatible_flash_implementations, REPO_ID]
    monkeypatch.setattr(base, "_compatible_flash_implementations", listed)
    torch.testing.assert_close(logits(model, REPO_ID), logits(model, "eager"))
    assert model.config._attn_implementation == "eager"
    assert calls == ["flash_attn_func"] * 2


def test_unlisted_name_is_replaced(model, calls, redirected):
    """Not our doing, but users will meet it: another name runs than the one asked for."""
    use(model, REPO_ID)
    assert model.config._attn_implementation != REPO_ID
