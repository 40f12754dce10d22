"""The parts that the docstrings of the public functions have in common."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TypeVar

_SHARED = """\
softmax_scale: factor of q . k; None: 1 / sqrt(d).
causal: query i sees no key right of its own position i + sk - sq.
window_size: (left, right), how many keys before and after its own position a query sees; None
    or -1: no limit. Together with causal: the intersection.
softcap: c > 0 replaces each score s by c * tanh(s / c); 0.0: off. On a GPU scores are then right
    to about 2e-7 * c (worked out in float32, not measured): a cap beyond 1e4 costs accuracy.
s_aux, learnable_sink: (h,), two names of one argument: a logit per head that takes part in each
    softmax, and in the LSE, without a value (attention sink). Of a row that sees no key it is the
    LSE; so give it to one part alone of keys that are attended to in parts and merged.
dropout_p: chance in [0, 1) that a probability is dropped. The mask is Philox4x32-10 with a
    seed from torch's default generator, so torch.manual_seed repeats it.
alibi_slopes: float32 (h,) or (b, h); adds -slope * |i + sk - sq - j| to the scores.
deterministic: ask for bitwise repeatable gradients; results always are.
num_splits: into how many parts to cut the keys, to be combined exactly; 0: the plan decides.
pack_gqa: whether query heads that share a key head share a tile; None: the plan decides. False
    with num_splits=1: a query's result has the same bits however many queries a call has.
score_mod: score_mod(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors) -> score, after scale
    and softcap, before alibi and mask; gets broadcastable tensors, indices count within the
    sequence. Has no gradient.
mask_mod: mask_mod(b, h, q_idx, kv_idx, seqlen_info, aux_tensors) -> bool, True where the query
    may see the key; intersected with causal and window_size.
aux_tensors: tensors that score_mod and mask_mod read.
scheduler_metadata: from get_scheduler_metadata; settles num_splits.
out: where to write the result, of its shape and dtype, and no part of q, k or v; None allocates it.
    Rows of a given one that belong to no sequence, behind the last of cu_seqlens or seqused, are
    left as they are.
return_lse, return_softmax_lse: two names of one argument: return (out, lse) instead of out.
unsupported: what functions of this name have in other packages (qv, attention_chunk, sm_margin,
    return_attn_probs, ...) with the value that asks for nothing; any other is refused."""

_RAISES = """\
Raises:
    TypeError, ValueError: naming the argument, its value, the rule and the way out, before
        anything is written.
    NotImplementedError: a combination that the variant on this device does not provide.

Method: Dao et al., FlashAttention (2022) and FlashAttention-2 (2023); online softmax after
Milakov and Gimelshein (2018)."""

_Function = TypeVar("_Function", bound=Callable)


def documented(function: _Function) -> _Function:
    """Fill {shared} and {raises} into the docstring; entries the function lacks are left out."""
    if function.__doc__ is None:  # python -OO
        return function
    names = function.__code__.co_varnames
    shared = "\n".join(
        entry for entry in _entries(_SHARED) if entry.split(":")[0].split(",")[0] in names
    )
    function.__doc__ = function.__doc__.replace(
        "{shared}", textwrap.indent(shared, " " * 8).lstrip()
    ).replace("{raises}", textwrap.indent(_RAISES, " " * 4).lstrip())
    return function


def _entries(text: str) -> list[str]:
    """Cut at lines that do not start with a space."""
    entries: list[str] = []
    for line in text.splitlines():
        if line.startswith(" "):
            entries[-1] += "\n" + line
        else:
            entries.append(line)
    return entries
