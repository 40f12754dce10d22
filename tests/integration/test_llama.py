"""Llama: dense prefill and decode, and padded batches, which transformers packs."""

from __future__ import annotations

import pytest
import torch

from ..conftest import REPO_ID
from .conftest import randomise, use

transformers = pytest.importorskip("transformers")

LENGTH, PADDING = 17, 5


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return randomise(transformers.LlamaForCausalLM(config), std=0.05)


@pytest.fixture
def batch(model, device):
    """Two prompts, the first shorter and padded on the left."""
    ids = torch.randint(1, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    model.to(device, torch.float32 if device.type == "cpu" else torch.float16)
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def dense(batch):
    """The same prompts as if nothing were padding."""
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


@torch.inference_mode()
def logits(model, implementation, inputs):
    use(model, implementation)
    return model(**inputs).logits * inputs["attention_mask"][..., None]


def generate(model, implementation, inputs):
    use(model, implementation)
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)


def test_dense_logits(model, batch, calls):
    inputs = dense(batch)
    torch.testing.assert_close(logits(model, REPO_ID, inputs), logits(model, "eager", inputs))
    assert calls == ["flash_attn_func"] * 2


def test_padded_logits(model, batch, calls):
    torch.testing.assert_close(logits(model, REPO_ID, batch), logits(model, "eager", batch))
    assert calls == ["flash_attn_varlen_func"] * 2


def test_dense_generation(model, batch, calls):
    inputs = dense(batch)
    assert generate(model, REPO_ID, inputs).equal(generate(model, "eager", inputs))
    assert set(calls) == {"flash_attn_func"}


def test_padded_generation(model, batch, calls):
    assert generate(model, REPO_ID, batch).equal(generate(model, "eager", batch))
    assert "flash_attn_varlen_func" in calls


def test_training_step(model, batch, device, calls, tmp_path):
    """`from_pretrained` takes the kernel's name, and gradients reach every parameter."""
    if device.type == "cuda":
        pytest.skip("the GPU kernels are forward only")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=REPO_ID, allow_all_kernels=True, dtype=torch.float32
    )
    loss = loaded(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert calls
