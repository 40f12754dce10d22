"""The cpu variant: every argument of the public functions, exactly, in PyTorch operations.

It runs on any machine and defines what each argument means; the GPU kernels must agree with it.

    groups    which queries meet which keys, for every memory layout
    scores    dot products -> masked scores: softcap, score_mod, alibi, the mask
    dropout   the random mask, reproducible from a seed
    forward   online softmax over tiles, split-KV, sinks
    backward  gradients, recomputing the scores tile by tile
    append    new keys and values into the cache, rotary embedding
"""

from .append import append_kv
from .backward import backward
from .forward import explain, forward

__all__ = ["append_kv", "backward", "explain", "forward"]
