"""A real language model: the same greedy text as with eager attention."""

from __future__ import annotations

import sys

import pytest
import torch

from ..conftest import REPO_ID, ROOT
from .conftest import use

transformers = pytest.importorskip("transformers")

PROMPT = "The capital of France is"


def test_greedy_text(calls):
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import model_directory
    finally:
        sys.path.pop(0)
    try:
        directory = model_directory()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")

    def text(implementation: str) -> str:
        use(model, implementation)
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return tokenizer.decode(tokens[0])

    expected = text("eager")
    assert not calls
    assert text(REPO_ID) == expected
    assert "Paris" in expected
    assert set(calls) == {"flash_attn_func"}
