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
    """Requests beside each other, whose keys are read from the pages."""

    start: int  # the first of their tokens in the batch
    end: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Tensor  # int32 (requests + 1,), beginning at 0
    seq_lens: Tensor  # int32 (requests,)
    block_table: Tensor  # int32 (requests, pages)


@dataclass
class Fresh:
    """Requests at the end of the batch that have no earlier tokens: their keys are all at hand."""

    start: int  # the first of their tokens in the batch
    end: int
    max_query_len: int
    query_start_loc: Tensor  # int32 (requests + 1,), beginning at 0


def tokens_of(part: Cached | Fresh, t: Tensor) -> Tensor:
    """Rows of `t`, of a batch, that are the part's; `t` itself if all are: a slice takes 1 us."""
    if part.start == 0 and part.end == t.shape[0]:
        return t
    return t[part.start : part.end]


@dataclass
class FlashAttn4Metadata:
    """A batch, in vLLM's order: parts that are `cached`, then a `fresh` one.

    Requests that decode are a part of their own, so that each kernel gets what it is made for.
    `whole` is all of the batch read from the pages, for layers that share those of another layer.
    """

    whole: Cached
    cached: tuple[Cached, ...]
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
        # vLLM then puts requests with so few queries first: decoding ones, and drafts to verify.
        if vllm_config is not None:
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttn4Metadata:
        """The batch in parts, or in one if `fast_build`.

        Raises:
            NotImplementedError: causal differs between requests.
        """
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            raise NotImplementedError(
                "causal=a tensor: flash-attn-4 masks all requests of a batch alike. "
                "Select another attention backend for this model."
            )
        whole = _whole(common)
        if fast_build:
            return FlashAttn4Metadata(whole, (whole,), None, common.causal)
        num_cached = _num_cached(common)
        num_decodes = _num_decodes(common, num_cached, self.reorder_batch_threshold or 1)
        if num_cached == common.num_reqs and num_decodes in (0, num_cached):
            return FlashAttn4Metadata(whole, (whole,), None, common.causal)
        cuts = ((0, num_decodes), (num_decodes, num_cached))
        return FlashAttn4Metadata(
            whole=whole,
            cached=tuple(_cached(common, a, b) for a, b in cuts if a < b),
            fresh=_fresh(common, num_cached) if num_cached < common.num_reqs else None,
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
        first, parts = 0, []
        for part in metadata.cached:
            last = first + part.seq_lens.shape[0]
            parts.append(replace(part, block_table=blk_table[first:last]))
            first = last
        whole = replace(metadata.whole, block_table=blk_table)
        return replace(metadata, whole=whole, cached=tuple(parts))


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


def _num_decodes(common: CommonAttentionMetadata, num_cached: int, few: int) -> int:
    """How many of the first requests have at most `few` queries."""
    starts = common.query_start_loc_cpu[: num_cached + 1].numpy()
    (many,) = (starts[1:] - starts[:-1] > few).nonzero()
    return int(many[0]) if len(many) else num_cached


def _whole(common: CommonAttentionMetadata) -> Cached:
    return Cached(
        start=0,
        end=common.num_actual_tokens,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        query_start_loc=common.query_start_loc,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
    )


def _cached(common: CommonAttentionMetadata, first: int, last: int) -> Cached:
    starts = common.query_start_loc_cpu[first : last + 1]
    on_device = common.query_start_loc[first : last + 1]
    longest = getattr(common, "seq_lens_cpu_upper_bound", None)
    return Cached(
        start=int(starts[0]),
        end=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=common.max_seq_len if longest is None else int(longest[first:last].max()),
        query_start_loc=on_device - on_device[0] if first else on_device,
        seq_lens=common.seq_lens[first:last],
        block_table=common.block_table_tensor[first:last],
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
