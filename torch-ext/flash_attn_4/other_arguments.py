"""Arguments that functions of these names have elsewhere, and not here.

Callers of FlashAttention-2, 3 and 4, vLLM and SGLang pass them with the value that asks for
nothing; that is accepted, and any other refused by name with the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

from torch import Tensor

from .flash_attn4_cute.checks import as_int, plain, refuse

_ABSENT = (None,)
_OFF = (None, False)
_ZERO = (None, 0)
_MERGE = "Attend to the keys of each rank with return_lse=True and use merge_attention_states"
_BLOCKS = "_flash_attn_fwd takes block lists; or express the mask by mask_mod"
_PACKED = "flash_attn_varlen_func has it; without cu_seqlens it takes dense batches"
_ROWS = "Leave it out: each row is merged by itself, and those that no sequence has do no harm"
_MODS = "flash_attn_varlen_func has it, for caches too: pass seqused_k and block_table"
_SEEN = "Leave it out: no gradient is needed of a function that has none"
_LATENT = "Pass torch.cat([q, qv], -1) and torch.cat([k, v], -1), with softmax_scale"
_NOT_HERE = "Leave {name} out, or pass None"

# By name: what asks for nothing, and what to do instead of anything else.
_FOREIGN: dict[str, tuple[tuple, str]] = {
    "attention_chunk": (_ZERO, "Express the chunks by mask_mod, or by window_size"),
    "aux_scalars": (_ABSENT, "Pass them as aux_tensors"),
    "aux_tensor_leading_dims": (_ABSENT, _NOT_HERE),
    "aux_tensors": (_ABSENT, _MODS),
    "block_sparse_tensors": (_ABSENT, _BLOCKS),
    "block_sparse_tensors_bwd": (_ABSENT, _BLOCKS),
    "cache_leftpad": (_ABSENT, "Leave it out: nothing here depends on it"),
    "cp_rank": (_ZERO, _MERGE),
    "cp_tot_seqused_k": (_ABSENT, _MERGE),
    "cp_world_size": ((None, 1), _MERGE),
    "cu_seqlens": (_ABSENT, _ROWS),
    "cu_seqlens_k_new": (_ABSENT, "Leave it out: nothing here depends on it"),
    "deterministic": (_OFF, "Leave it out: results always have the same bits"),
    "disable_scheduler_metadata": (_OFF, "Leave scheduler_metadata out"),
    "dropout_p": (_ZERO, "flash_attn_varlen_func has it"),
    "dynamic_causal": (_ABSENT, "Pass causal, or decide by mask_mod"),
    "fa_version": ((None, 2, 3, 4), "Leave it out: there is one kernel for all"),
    "fp8_kv_dequant": (_OFF, "Leave it out: the dtypes of q, k and v say it"),
    "gather_bwd_recompute_p": (_OFF, _NOT_HERE),
    "gather_bwd_token_chunk": (_ABSENT, _NOT_HERE),
    "gather_kv_indices": (_ABSENT, "Express the choice of keys by mask_mod"),
    "gather_kv_valid_length": (_ABSENT, "Express the choice of keys by mask_mod"),
    "k_descale": (_ABSENT, _PACKED),
    "mask_mod": (_ABSENT, _MODS),
    "max_seqlen_k_new": (_ZERO, "Add it to max_seqlen_k"),
    "output_scale": (_ABSENT, "Scale the result after the call"),
    "q_descale": (_ABSENT, "Pass q in half precision, or put its factor into softmax_scale"),
    "q_v": (_ABSENT, _LATENT),
    "qv": (_ABSENT, _LATENT),
    "return_attn_probs": (_OFF, "Pass return_lse=True for (out, lse); no probability is stored"),
    "rotary_seqlens": (_ABSENT, "Rotate q and k before the call"),
    "score_mod": (_ABSENT, _MODS),
    "score_mod_bwd": (_ABSENT, _SEEN),
    "seqlen_k_per_split": (_ABSENT, "Pass num_splits"),
    "seqused": (_ABSENT, _ROWS),
    "sinks": (_ABSENT, "Pass them as s_aux"),
    "sm_margin": (_ZERO, "Leave it out: the kernels take the SMs that they find free"),
    "v_descale": (_ABSENT, _PACKED),
    "ver": ((None, 2, 3, 4), "Leave it out: there is one kernel for all"),
    "virtual_batch_idx": (_ABSENT, _ROWS),
}
_HINTS = frozenset({"min_seqlen_k"})  # integers that change no result


def check_foreign(function: Callable, given: dict[str, Any], *, any_name: bool = False) -> None:
    """Refuse what `function` does not have, unless it asks for nothing.

    With `any_name`, None and False ask for nothing under names that no release has, too.

    Raises:
        NotImplementedError: a known argument that asks for something.
        TypeError: a name that no release has.
    """
    for name, value in given.items():
        if any_name and (value is None or value is False):
            continue
        if name in _HINTS:
            if value is not None:
                as_int(name, value)
            continue
        if name not in _FOREIGN and not any_name:
            raise _unexpected(function, name, value)
        neutral, way_out = _FOREIGN.get(name, (_ABSENT, _NOT_HERE))
        if not _is_one_of(neutral, value):
            raise _unsupported(function, name, value, way_out)


def _is_one_of(neutral: tuple, value: Any) -> bool:
    """By value, as all numbers count: False is 0, and so are NumPy's."""
    value = plain(value)
    return isinstance(value, bool | int | float | NoneType) and value in neutral


def _unsupported(function: Callable, name: str, value: Any, way_out: str) -> NotImplementedError:
    value = type(value).__name__ if isinstance(value, Tensor) else repr(value)
    rule = f"is not supported by {function.__name__}"
    return refuse(NotImplementedError, name, value, rule, way_out.format(name=name))


def _unexpected(function: Callable, name: str, value: Any) -> TypeError:
    import difflib
    import inspect

    known = [n for n in inspect.signature(function).parameters if n != "unsupported"]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    way_out = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(known)}."
    return TypeError(
        f"{name}={type(value).__name__}: {function.__name__}() got an unexpected keyword argument "
        f"{name!r}. {way_out}"
    )
