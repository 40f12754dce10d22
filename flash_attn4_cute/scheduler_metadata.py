"""What a serving engine decides once per step and hands to every layer's attention call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from . import checks
from .checks import refuse
from .problem import AttentionOptions, AttentionTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerMetadata:
    """The shape of a step, the number of splits chosen for it, and whether heads are packed.

    It holds no tensor, so a captured CUDA graph replays at other lengths unchanged. Calls that pass
    it must have these heads and this batch, and sequences no longer than the maxima.
    """

    batch: int
    # The maxima have decided the number of splits, and decide nothing more: steps that differ in
    # them alone are the same to a call.
    max_seqlen_q: int = field(compare=False)
    max_seqlen_k: int = field(compare=False)
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    page_size: int | None
    num_splits: int
    pack_gqa: bool | None

    def check(self, tensors: AttentionTensors) -> None:
        """Raise ValueError if `tensors` are not of the step that this was made for."""
        q, k, v = tensors.q, tensors.k, tensors.v
        cu = tensors.cu_seqlens_q
        page_size = k.shape[1] if tensors.page_table is not None else None
        for name, made_for, found in (
            ("batch", self.batch, q.shape[0] if cu is None else cu.shape[0] - 1),
            ("num_heads", self.num_heads, q.shape[-2]),
            ("num_heads_kv", self.num_heads_kv, k.shape[-2]),
            ("head_dim", self.head_dim, q.shape[-1]),
            ("head_dim_v", self.head_dim_v, v.shape[-1]),
            ("page_size", self.page_size, page_size),
        ):
            if made_for != found:
                raise refuse(
                    ValueError,
                    f"scheduler_metadata.{name}",
                    made_for,
                    f"the call has {name} {found}",
                    "Make it anew with get_scheduler_metadata for this step",
                )


def with_metadata(
    metadata: object, tensors: AttentionTensors, options: AttentionOptions
) -> AttentionOptions:
    """The options of a call for which `metadata` has decided what they leave open."""
    if not isinstance(metadata, SchedulerMetadata):
        raise refuse(
            TypeError,
            "scheduler_metadata",
            type(metadata).__name__,
            "must come from get_scheduler_metadata of this package",
            "Make it with get_scheduler_metadata, or pass None",
        )
    if options.num_splits not in (0, metadata.num_splits):
        raise refuse(
            ValueError,
            "num_splits",
            options.num_splits,
            f"scheduler_metadata was made for {metadata.num_splits} splits",
            "Pass num_splits=0 to take it from scheduler_metadata",
        )
    for name, t in (("q", tensors.q), ("k", tensors.k), ("v", tensors.v)):
        checks.check_is_tensor(name, t)
    metadata.check(tensors)
    pack_gqa = metadata.pack_gqa if options.pack_gqa is None else options.pack_gqa
    return replace(options, num_splits=metadata.num_splits, pack_gqa=pack_gqa)
