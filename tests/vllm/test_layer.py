"""One attention layer of the plugin against the float64 oracle, on vLLM's own batches and pages."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from flash_attn_4_vllm.backend import FlashAttn4Backend
from flash_attn_4_vllm.cache import FP8
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from .. import acceptance
from ..oracle import Rule

HEADS, KV_HEADS, D, PAGE, PAGES = 4, 2, 32, 16, 24
K_SCALE, V_SCALE = 0.5, 2.0
# (queries, tokens in all) of each request: decoding, a verified draft, later and first chunks
BATCH = ((1, 33), (1, 1), (4, 50), (9, 29), (7, 7), (20, 20))


@dataclass
class Step:
    """A batch as vLLM hands it to a layer, and what the layer's requests hold."""

    common: CommonAttentionMetadata
    q: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cache: torch.Tensor


def randn(*shape, dtype):
    return torch.randn(shape).to(dtype)


def step(batch=BATCH, dtype=torch.float32, cache_dtype=None) -> Step:
    """A step of the engine: earlier tokens are in the cache, this step's are not yet.

    Tensors are made on PyTorch's default device.
    """
    lengths = [total for _, total in batch]
    keys, values = ([randn(n, KV_HEADS, D, dtype=dtype) for n in lengths] for _ in range(2))
    pages = torch.randperm(PAGES - 1) + 1
    table, slots = [], []
    for total in lengths:
        count = -(-total // PAGE)
        mine, pages = pages[:count], pages[count:]
        positions = torch.arange(total)
        slots.append(mine[positions // PAGE] * PAGE + positions % PAGE)
        table.append(mine)
    width = max(map(len, table)) + 1
    block_table = torch.zeros(len(batch), width, dtype=torch.int32)  # 0: vLLM's null block
    for row, mine in zip(block_table, table, strict=True):
        row[: len(mine)] = mine
    starts = torch.tensor([0, *[queries for queries, _ in batch]]).cumsum(0).int()
    news = [
        torch.cat([x[-n:] for x, (n, _) in zip(xs, batch, strict=True)]) for xs in (keys, values)
    ]
    old_slots = torch.cat([s[: len(s) - n] for s, (n, _) in zip(slots, batch, strict=True)])
    olds = [
        torch.cat([x[: len(x) - n] for x, (n, _) in zip(xs, batch, strict=True)])
        for xs in (keys, values)
    ]
    cache = torch.full((PAGES, KV_HEADS, PAGE, 2 * D), torch.nan, dtype=dtype)
    if cache_dtype == FP8:
        cache = cache.to(FP8).view(torch.uint8)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(batch),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(queries for queries, _ in batch),
        max_seq_len=max(lengths),
        block_table_tensor=block_table,
        slot_mapping=torch.cat([s[len(s) - n :] for s, (n, _) in zip(slots, batch, strict=True)]),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32).cpu(),
    )
    made = Step(common, randn(int(starts[-1]), HEADS, D, dtype=dtype), news, keys, values, cache)
    layer(fp8=cache_dtype == FP8).do_kv_cache_update(scales(cache), *olds, cache, old_slots)
    return made


def scales(cache):
    """What a layer knows of an fp8 cache, as vLLM's own layer has it."""
    factors = torch.tensor([K_SCALE, V_SCALE], device=cache.device)
    return SimpleNamespace(_k_scale=factors[0], _v_scale=factors[1])


def layer(fp8=False, **options):
    """A layer, made as vLLM makes it."""
    named = {"sliding_window": None, "alibi_slopes": None} | options
    dtype = "fp8" if fp8 else "auto"
    return FlashAttn4Backend.get_impl_cls()(
        HEADS, D, D**-0.5, num_kv_heads=KV_HEADS, kv_cache_dtype=dtype, **named
    )


def builder():
    return FlashAttn4Backend.get_builder_cls()(None, [], None, torch.device("cpu"))


def run(made: Step, impl, metadata=None) -> list[torch.Tensor]:
    """Both halves of a layer's work -> out of each request."""
    if metadata is None:
        metadata = builder().build(0, made.common)
    known = scales(made.cache)
    impl.do_kv_cache_update(known, *made.new, made.cache, made.common.slot_mapping)
    out = torch.full_like(made.q, torch.nan)
    impl.forward(known, made.q, *made.new, made.cache, metadata, out)
    starts = made.common.query_start_loc.tolist()
    return [out[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def judge(made: Step, outs: list[torch.Tensor], rule: Rule) -> None:
    starts = made.common.query_start_loc.tolist()
    for b, out in enumerate(outs):
        q = made.q[starts[b] : starts[b + 1]]
        reference = acceptance.reference(q, made.keys[b], made.values[b], rule, b)
        acceptance.check(out, None, reference, f"request {b}")


RULES = {
    "plain": ({}, {}),
    "window": ({"sliding_window": 6}, {"window": (5, 0)}),
    "softcap": ({"logits_soft_cap": 3.0}, {"softcap": 3.0}),
    "alibi": ({"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, {"alibi_slopes": None}),
    "sinks": ({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"sink": None}),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_a_mixed_batch(kernel, name, split):
    """Requests of every kind at once, with prompts that start from nothing apart or not."""
    options, rule = RULES[name]
    rule = dict(rule)
    if name == "alibi":
        rule["alibi_slopes"] = torch.tensor(options["alibi_slopes"])
    if name == "sinks":
        rule["sink"] = options["sinks"]
    made = step()
    metadata = builder().build(0, made.common, fast_build=not split)
    assert (metadata.fresh is not None) == split
    judge(made, run(made, layer(**options), metadata), Rule(causal=True, **rule))


@pytest.mark.parametrize("window", [None, 6])
def test_a_batch_that_is_not_causal(kernel, window):
    """Drafts that are made at once see each other; a window is as wide to either side."""
    made = step()
    made.common.causal = False
    rule = {} if window is None else {"window": (window - 1, window - 1)}
    outs = run(made, layer(sliding_window=window), builder().build(0, made.common))
    judge(made, outs, Rule(**rule))


def test_fp8_cache(kernel):
    """Keys and values are divided by the layer's scales, rounded, and multiplied when read."""
    made = step(cache_dtype=FP8)
    metadata = builder().build(0, made.common, fast_build=True)
    outs = run(made, layer(fp8=True), metadata)

    def rounded(xs, scale):
        return [((x.float() / scale).to(FP8).float() * scale).to(x.dtype) for x in xs]

    made.keys, made.values = rounded(made.keys, K_SCALE), rounded(made.values, V_SCALE)
    judge(made, outs, Rule(causal=True))


def test_layers_that_share_a_cache(kernel):
    """Such a layer writes nothing, and reads all of its keys from the pages of another one."""
    made = step()
    layer().do_kv_cache_update(scales(made.cache), *made.new, made.cache, made.common.slot_mapping)
    metadata = builder().build(0, made.common)
    out = torch.full_like(made.q, torch.nan)
    sharing = layer(kv_sharing_target_layer_name="another")
    sharing.forward(scales(made.cache), made.q, None, None, made.cache, metadata, out)
    starts = made.common.query_start_loc.tolist()
    outs = [out[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    judge(made, outs, Rule(causal=True))


def test_another_group_of_layers(kernel):
    """The same batch with its pages elsewhere, as vLLM asks for models with several groups."""
    made = step()
    metadata = builder().build(0, made.common)
    moved = torch.randperm(PAGES)
    table = moved[made.common.block_table_tensor.long()].int()
    slots = made.common.slot_mapping
    slots = moved[slots // PAGE] * PAGE + slots % PAGE
    elsewhere = torch.empty_like(made.cache)
    elsewhere[moved] = made.cache
    made.cache, made.common.slot_mapping = elsewhere, slots
    updated = builder().update_block_table(metadata, table, slots)
    judge(made, run(made, layer(), updated), Rule(causal=True))


@pytest.mark.parametrize(
    "batch, requests",
    [
        (BATCH, [2, 2, 2]),
        (((1, 8), (1, 9)), [2]),  # decoding alone
        (((1, 8), (5, 9), (5, 9)), [1, 2]),
        (((5, 9), (1, 8)), [2]),  # not in vLLM's order: right, if not fast
        (((8, 8), (1, 9)), [2]),  # a prompt before a decoding request stays with it
        (((8, 8), (5, 5)), [2]),
        (((1, 9), (0, 0), (0, 0)), [3]),  # padding, as graphs have it
        (((1, 9), (0, 0), (8, 8), (0, 0)), [1, 3]),
    ],
)
def test_parts_of_a_batch(batch, requests):
    made = step(batch)
    metadata = builder().build(0, made.common)
    parts = [*metadata.cached, *filter(None, [metadata.fresh])]
    assert [len(part.query_start_loc) - 1 for part in parts] == requests
    assert [part.start for part in parts] == [0, *[part.end for part in parts[:-1]]]
    assert all(part.query_start_loc[0] == 0 for part in parts)
    outs = run(made, layer(), metadata)
    judge(made, outs, Rule(causal=True))


class OnlyViews(TorchDispatchMode):
    """Lets through what makes views of tensors; anything else would be work, or a wait."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.is_view, f"{operator} in the plugin's own code"
        return operator(*args, **(kwargs or {}))


def test_a_captured_step_only_calls_the_kernel(kernel, monkeypatch):
    """What a CUDA graph of a decoding step would hold of the plugin's own: nothing.

    The kernel follows the very tensors that vLLM refills, so the graph does.
    """
    made = step(((1, 33), (1, 20), (0, 0)))
    metadata = builder().build_for_cudagraph_capture(made.common)
    seen = []
    monkeypatch.setattr(
        kernel, "flash_attn_varlen_func", lambda *args, **kwargs: seen.append((args, kwargs))
    )
    impl = layer()
    out = torch.empty_like(made.q)
    with OnlyViews():
        impl.forward(scales(made.cache), made.q, *made.new, made.cache, metadata, out)
    ((_, keys, _, starts, *_), keywords) = seen[0]
    common = made.common
    assert keys.data_ptr() == made.cache.data_ptr()
    assert keywords["out"].data_ptr() == out.data_ptr()
    for ours, theirs in (
        (starts, common.query_start_loc),
        (keywords["seqused_k"], common.seq_lens),
        (keywords["block_table"], common.block_table_tensor),
    ):
        assert ours.data_ptr() == theirs.data_ptr()


def test_slots_that_are_left_out(kernel):
    made = step()
    before = made.cache.clone()
    nowhere = torch.full_like(made.common.slot_mapping, -1)
    layer().do_kv_cache_update(scales(made.cache), *made.new, made.cache, nowhere)
    torch.testing.assert_close(made.cache, before, equal_nan=True, rtol=0, atol=0)


def test_what_is_refused(kernel):
    made = step()
    metadata = builder().build(0, made.common)
    with pytest.raises(NotImplementedError, match="output_scale: .*fuse_attn_quant"):
        layer().forward(
            scales(made.cache),
            made.q,
            *made.new,
            made.cache,
            metadata,
            made.q,
            output_scale=scales(made.cache)._k_scale,
        )
    made.common.causal = torch.ones(len(BATCH), dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="causal=a tensor"):
        builder().build(0, made.common)


def test_memory_is_measured_without_metadata(kernel):
    out = torch.full((3, HEADS, D), torch.nan)
    assert layer().forward(scales(out), out, out, out, torch.empty(0), None, out).eq(0).all()
