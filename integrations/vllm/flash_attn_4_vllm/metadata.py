"""What the attention calls of all layers share in one step of the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)


@dataclass
class Cached:
    """Requests from the start of the batch on, whose keys are read from the pages."""

    num_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Tensor  # int32 (requests + 1,)
    seq_lens: Tensor  # int32 (requests,)
    block_table: Tensor  # int32 (requests, pages)


@dataclass
class Fresh:
    """Requests at the end of the batch that have no earlier tokens: their keys are all at hand."""

    start: int  # the first of their tokens in the batch
    end: int
    max_query_len: int
    query_start_loc: Tensor  # int32 (requests + 1,), beginning at 0


@dataclass
class FlashAttn4Metadata:
    """A batch, in vLLM's order: `cached` requests, then `fresh` ones; either may be missing.

    `whole` is all of it read from the pages, for layers that share those of another layer.
    """

    whole: Cached
    cached: Cached | None
    fresh: Fresh | None
    causal: bool


class FlashAttn4MetadataBuilder(AttentionMetadataBuilder[FlashAttn4Metadata]):
    """Reads lengths on the host where vLLM has them there; never waits for the device."""

    # Graphs of batches with equally many queries a request: decoding, and verifying drafts.
    # Lengths, pages and starts are read from device memory, so that a captured graph follows them.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttn4Metadata:
        """The batch, with requests that start from nothing apart, unless `fast_build`.

        Raises:
            NotImplementedError: causal differs between requests.
        """
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            raise NotImplementedError(
                "causal=a tensor: flash-attn-4 masks all requests of a batch alike. "
                "Select another attention backend for this model."
            )
        num_cached = common.num_reqs if fast_build else _num_cached(common)
        whole = _whole(common)
        if num_cached == common.num_reqs:
            return FlashAttn4Metadata(whole, whole, None, common.causal)
        return FlashAttn4Metadata(
            whole=whole,
            cached=_cached(common, num_cached) if num_cached else None,
            fresh=_fresh(common, num_cached),
            causal=common.causal,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttn4Metadata:
        """All requests from the pages: a replay may meet any of them with earlier tokens."""
        return self.build(0, common_attn_metadata, fast_build=True)

    def update_block_table(
        self, metadata: FlashAttn4Metadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> FlashAttn4Metadata:
        """The same batch in another group of layers, whose pages lie elsewhere."""
        whole = replace(metadata.whole, block_table=blk_table)
        if metadata.fresh is None:
            return replace(metadata, whole=whole, cached=whole)
        cached = metadata.cached
        if cached is not None:
            cached = replace(cached, block_table=blk_table[: cached.seq_lens.shape[0]])
        return replace(metadata, whole=whole, cached=cached)


def _num_cached(common: CommonAttentionMetadata) -> int:
    """How many requests to read from the pages; those after them have all their keys at hand.

    A prompt without earlier tokens need not wait for its pages, and what decodes beside it is left
    to the decode kernel. Every request counts as cached where the host knows no better.
    """
    longest = getattr(common, "seq_lens_cpu_upper_bound", None)
    if longest is None or not common.causal:
        return common.num_reqs
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
    queries = starts[1:] - starts[:-1]
    # The bound is exact for prompts. Requests without queries are padding, and may stand anywhere.
    from_pages = ((longest[: common.num_reqs].numpy() > queries) & (queries > 0)) | (queries == 1)
    (where,) = from_pages.nonzero()
    num_cached = int(where[-1]) + 1 if len(where) else 0
    return num_cached if starts[-1] > starts[num_cached] else common.num_reqs


def _whole(common: CommonAttentionMetadata) -> Cached:
    return Cached(
        num_tokens=common.num_actual_tokens,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        query_start_loc=common.query_start_loc,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
    )


def _cached(common: CommonAttentionMetadata, num_cached: int) -> Cached:
    starts = common.query_start_loc_cpu[: num_cached + 1]
    assert common.seq_lens_cpu_upper_bound is not None, "the batch was split by it"
    return Cached(
        num_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(common.seq_lens_cpu_upper_bound[:num_cached].max()),
        query_start_loc=common.query_start_loc[: num_cached + 1],
        seq_lens=common.seq_lens[:num_cached],
        block_table=common.block_table_tensor[:num_cached],
    )


def _fresh(common: CommonAttentionMetadata, num_cached: int) -> Fresh:
    starts = common.query_start_loc_cpu[num_cached : common.num_reqs + 1]
    on_device = common.query_start_loc[num_cached : common.num_reqs + 1]
    return Fresh(
        start=int(starts[0]),
        end=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        query_start_loc=on_device - on_device[0] if num_cached else on_device,
    )
