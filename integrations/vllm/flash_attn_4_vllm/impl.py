"""One attention layer: writes keys and values into the pages, then calls the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .cache import split_cache, write_cache
from .kernel import kernel
from .metadata import Cached, FlashAttn4Metadata, Fresh, tokens_of


class FlashAttn4Impl(AttentionImpl[FlashAttn4Metadata]):
    """vLLM makes one for each layer; the kernel is loaded with the first, before any request."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.fp8 = kv_cache_dtype.startswith("fp8")
        # vLLM counts the query's own position, the kernel the positions beside it.
        self.sliding = None if sliding_window is None else sliding_window - 1
        self.options: dict[str, Any] = {
            "softmax_scale": self.scale,
            "softcap": float(logits_soft_cap or 0.0),
            "s_aux": sinks,
            "alibi_slopes": None if alibi_slopes is None else torch.tensor(alibi_slopes).float(),
        }
        self.kernel = kernel()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttn4Metadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch.

        Args:
            layer: its _k_scale and _v_scale are the factors of an fp8 cache.
            query: (tokens, heads, head_size).
            key, value: (tokens, kv_heads, head_size); already in the cache.
            kv_cache: (blocks, kv_heads, block_size, 2 * head_size).
            attn_metadata: None while vLLM measures how much memory the model takes.
            output: (tokens, heads, head_size), written.

        Raises:
            NotImplementedError: quantised output is asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "output_scale: flash-attn-4 writes its output in the dtype of the model. "
                "Switch off the fusion of attention and quantisation (fuse_attn_quant)."
            )
        batch = attn_metadata
        if batch is None:
            return output.fill_(0)
        if self.attn_type == AttentionType.ENCODER_ONLY:
            whole = batch.whole
            all_keys = Fresh(0, whole.end, whole.max_query_len, whole.query_start_loc)
            self._attend_fresh(query, key, value, all_keys, output, causal=False)
            return output
        cached, fresh = batch.cached, batch.fresh
        if self.kv_sharing_target_layer_name is not None:
            cached, fresh = (batch.whole,), None
        for part in cached:
            self._attend_cached(layer, query, kv_cache, part, output, batch.causal)
        if fresh is not None:
            self._attend_fresh(query, key, value, fresh, output, batch.causal)
        return output

    def _window(self, causal: bool) -> tuple[int, int]:
        """As wide to the right as to the left where queries see what follows them."""
        if self.sliding is None:
            return -1, -1
        return self.sliding, 0 if causal else self.sliding

    def _attend_cached(
        self,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        part: Cached,
        output: Tensor,
        causal: bool,
    ) -> None:
        keys, values = split_cache(kv_cache, self.head_size, self.fp8)
        descales = {}
        if self.fp8:
            shape = (part.seq_lens.shape[0], self.num_kv_heads)
            descales["k_descale"] = layer._k_scale.expand(shape).contiguous()
            descales["v_descale"] = layer._v_scale.expand(shape).contiguous()
        self.kernel.flash_attn_varlen_func(
            tokens_of(part, query),
            keys,
            values,
            part.query_start_loc,
            None,
            part.max_query_len,
            part.max_seq_len,
            seqused_k=part.seq_lens,
            block_table=part.block_table,
            causal=causal,
            window_size=self._window(causal),
            out=tokens_of(part, output),
            **descales,
            **self.options,
        )

    def _attend_fresh(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Fresh,
        output: Tensor,
        causal: bool,
    ) -> None:
        self.kernel.flash_attn_varlen_func(
            tokens_of(part, query),
            tokens_of(part, key),
            tokens_of(part, value),
            part.query_start_loc,
            part.query_start_loc,
            part.max_query_len,
            part.max_query_len,
            causal=causal,
            window_size=self._window(causal),
            out=tokens_of(part, output),
            **self.options,
        )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the tokens of a step where slot_mapping says; a negative slot is left out."""
        if self.attn_type == AttentionType.ENCODER_ONLY:
            return
        caches = split_cache(kv_cache, self.head_size)
        scales = layer._k_scale, layer._v_scale
        write_cache((key, value), caches, slot_mapping, self.kv_cache_dtype, scales)
