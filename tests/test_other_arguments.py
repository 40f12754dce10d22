"""Arguments that functions of these names have in other packages."""

import re

import numpy as np
import pytest
import torch

from .error_cases import cache, combine, dense, engine, metadata, varlen

NEUTRAL = {
    "flash_attn_func": {
        "return_attn_probs": False, "qv": None, "q_descale": None, "k_descale": None,
        "v_descale": None, "attention_chunk": 0, "sm_margin": 0,
    },
    "flash_attn_varlen_func": {
        "return_attn_probs": False, "q_v": None, "q_descale": None, "fa_version": 2,
        "cp_world_size": 1, "cp_rank": 0, "cp_tot_seqused_k": None, "dynamic_causal": None,
        "output_scale": None, "min_seqlen_k": 3,
    },
    "flash_attn_with_kvcache": {
        "qv": None, "q_descale": None, "rotary_seqlens": None, "attention_chunk": 0,
        "sm_margin": 0, "sinks": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("function", NEUTRAL)
def test_what_asks_for_nothing_is_accepted(fa4, function):
    """Eager and compiled; and each function has both names of return_lse."""
    tensors = [torch.randn(1, 5, 2, 16) for _ in range(3)]
    call = getattr(fa4, function)
    expected = call(*tensors)
    assert torch.equal(call(*tensors, **NEUTRAL[function]), expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors, **NEUTRAL[function]), expected)
    both = call(*tensors, return_softmax_lse=True)
    assert torch.equal(both[1], call(*tensors, return_lse=True)[1])


@pytest.mark.parametrize("zero", [False, 0, 0.0, np.int64(0), np.bool_(False), torch.tensor(0)])
def test_numbers_count_by_their_value(fa4, zero):
    fa4.flash_attn_func(**dense(sm_margin=zero, attention_chunk=zero, return_attn_probs=zero)[1])
    one = 1 + zero
    asked = engine(attention_chunk=zero, cp_world_size=one, cp_rank=zero, tuning=False)[1]
    fa4._flash_attn_fwd(**asked)


def test_metadata_and_merges_accept_it_too(fa4):
    _, step = metadata(cu_seqlens_k_new=None, cache_leftpad=None, max_seqlen_k_new=0, sm_margin=0)
    assert fa4.get_scheduler_metadata(**step) == fa4.get_scheduler_metadata(**metadata()[1])
    fa4.flash_attn_combine(**combine(cu_seqlens=None, seqused=None, virtual_batch_idx=None)[1])


@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        (dense, "attention_chunk", "=4: is not supported by flash_attn_func. .*mask_mod"),
        (varlen, "return_attn_probs", "=True: is not supported .*return_lse=True"),
        (dense, "k_descale", "=Tensor: is not supported .*flash_attn_varlen_func"),
        (varlen, "cp_rank", "=1: is not supported .*merge_attention_states"),
        (cache, "sm_margin", "=True: is not supported .*Leave it out"),
        (cache, "sinks", "=Tensor: is not supported .*s_aux"),
        (engine, "cp_world_size", "=4: is not supported by _flash_attn_fwd. .*merge_attention_st"),
        (engine, "tuning", "=4: is not supported by _flash_attn_fwd. Leave tuning out"),
        (metadata, "max_seqlen_k_new", "=1: is not supported .*Add it to max_seqlen_k"),
        (combine, "cu_seqlens", "=Tensor: is not supported by flash_attn_combine. Leave it out"),
    ],
)
def test_anything_else_is_refused_by_name(fa4, call, name, message):
    values = {"=4": 4, "=1": 1, "=True": True}
    value = values.get(message.split(":")[0], torch.ones(4))
    function, arguments = call(**{name: value})
    with pytest.raises(NotImplementedError, match=re.compile(name + message)):
        getattr(fa4, function)(**arguments)
