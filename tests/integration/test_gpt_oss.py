"""gpt-oss: attention sinks, and a sliding window in every other layer.

transformers replaces any name containing "flash" that is not on the model's own list by the first
name on that list, with a warning. Three ways lead to this kernel all the same; all are tested.
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
def logits(model, implementation=None, padding=0):
    """Of the tokens that are not padding, on the left of the first of two prompts."""
    ids = torch.randint(1, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    if implementation is not None:
        use(model, implementation)
    return model(ids, attention_mask=mask).logits[mask == 1]


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


@pytest.mark.parametrize("padding", [0, 5], ids=["dense", "padded"])
def test_by_the_helper(fa4, model, calls, redirected, padding):
    """The model's own list is extended, its class's is not; sinks count on both paths."""
    base = transformers.models.gpt_oss.modeling_gpt_oss.GptOssPreTrainedModel
    before = list(base._compatible_flash_implementations)
    expected = logits(model, "eager", padding)
    assert fa4.use_in_transformers(model, REPO_ID) is model
    assert model.config._attn_implementation == REPO_ID
    ours = logits(model, padding=padding)
    torch.testing.assert_close(ours, expected)
    assert calls == ["flash_attn_varlen_func" if padding else "flash_attn_func"] * 2
    assert base._compatible_flash_implementations == before

    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-torch.inf)
    assert not torch.allclose(logits(model, padding=padding), ours, atol=1e-2)


def test_gradients_of_sinks(model, fa4, redirected):
    """Training through the kernel: sinks have a gradient, on windowed and on full layers."""
    ids = torch.randint(1, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    gradients = {}
    for implementation in ("eager", REPO_ID):
        model.set_attn_implementation("eager")
        if implementation != "eager":
            fa4.use_in_transformers(model, implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        attention = [layer.self_attn for layer in model.model.layers]
        gradients[implementation] = [
            parameter.grad.clone() for a in attention for parameter in (a.sinks, a.q_proj.weight)
        ]
    torch.testing.assert_close(gradients[REPO_ID], gradients["eager"])
    assert all(gradient.any() for gradient in gradients["eager"])


def test_helper_says_when_another_kernel_would_run(fa4, model, redirected, monkeypatch):
    """As a release of transformers might do that looks elsewhere for the list."""
    adjust = type(model)._check_and_adjust_attn_implementation
    monkeypatch.setattr(
        type(model),
        "_check_and_adjust_attn_implementation",
        lambda self, name, **options: adjust(self, "eager", **options),
    )
    with pytest.raises(ValueError, match=f"name='{REPO_ID}': .* runs 'eager' instead"):
        fa4.use_in_transformers(model, REPO_ID)
    with pytest.raises(TypeError, match="model=int: must be a transformers.PreTrainedModel"):
        fa4.use_in_transformers(3, REPO_ID)


def test_unlisted_name_is_replaced(model, calls, redirected):
    """Not our doing, but users will meet it: another name runs than the one asked for."""
    use(model, REPO_ID)
    assert model.config._attn_implementation != REPO_ID
