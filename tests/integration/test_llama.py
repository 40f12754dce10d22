"""Llama: dense prefill and decode, and padded batches, which transformers packs."""

from __future__ import annotations

import copy

import pytest
import torch

from ..conftest import REPO_ID
from .conftest import randomise, use

transformers = pytest.importorskip("transformers")

LENGTH, PADDING, LAYERS = 17, 5, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return randomise(transformers.LlamaForCausalLM(config), std=0.05)


def prompts(padded: bool, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Two prompts; if `padded`, the first is shorter and padded on the left."""
    ids = torch.randint(1, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :PADDING] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


@torch.inference_mode()
def logits(model, implementation, inputs, dtype):
    """What a copy of the model in `dtype` gives at the tokens that are not padding."""
    model = copy.deepcopy(model).to(inputs["input_ids"].device, dtype)
    use(model, implementation)
    return model(**inputs).logits.float()[inputs["attention_mask"] == 1]


def generate(model, implementation, inputs):
    use(model, implementation)
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_logits(model, device, calls, padded):
    """Equal in float32; in half precision twice as far from float32 as eager attention at most."""
    inputs = prompts(padded, device)
    exact = logits(model, "eager", inputs, torch.float32)
    if device.type == "cpu":
        torch.testing.assert_close(logits(model, REPO_ID, inputs, torch.float32), exact)
    else:
        eager = logits(model, "eager", inputs, torch.float16)
        ours = logits(model, REPO_ID, inputs, torch.float16)
        assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()
    assert calls == ["flash_attn_varlen_func" if padded else "flash_attn_func"] * LAYERS


def test_dense_generation(model, calls):
    inputs = prompts(padded=False)
    assert generate(model, REPO_ID, inputs).equal(generate(model, "eager", inputs))
    assert set(calls) == {"flash_attn_func"}


def test_padded_generation(model, calls):
    inputs = prompts(padded=True)
    assert generate(model, REPO_ID, inputs).equal(generate(model, "eager", inputs))
    assert "flash_attn_varlen_func" in calls


def test_training_step(model, calls, tmp_path):
    """`from_pretrained` takes the kernel's name; gradients equal those of eager attention."""
    model.save_pretrained(tmp_path)
    inputs = prompts(padded=True)
    # The token after the padding is predicted from padding, which eager attention computes too.
    predictable = inputs["attention_mask"].roll(1, dims=1) * inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill(predictable == 0, -100)
    gradients = {}
    for implementation in (REPO_ID, "eager"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=implementation, allow_all_kernels=True
        ).float()
        loaded(**inputs, labels=labels).loss.backward()
        gradients[implementation] = [parameter.grad for parameter in loaded.parameters()]
    torch.testing.assert_close(gradients[REPO_ID], gradients["eager"])
    assert calls == ["flash_attn_varlen_func"] * LAYERS


@pytest.mark.gpu
def test_training_on_a_gpu_is_refused(model, device):
    """There is no backward pass there yet, and a loss must not come without its gradients."""
    copied = copy.deepcopy(model).to(device, torch.bfloat16)
    use(copied, REPO_ID)
    inputs = prompts(padded=True, device=device)
    with pytest.raises(NotImplementedError, match="requires_grad=True"):
        copied(**inputs, labels=inputs["input_ids"])
