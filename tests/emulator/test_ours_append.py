"""The append kernel on every card that it runs on, under several schedules, against the oracle."""

import importlib

import pytest
import torch

import ptx_emulator
from flash_attn4_cute import append_plan
from flash_attn4_cute.cache_update import CacheUpdate
from flash_attn4_cute.problem import AttentionTensors
from ptx_emulator.cli.ours import kernels_on

from .. import acceptance
from ..append_cases import (
    APPENDS,
    BEFORE,
    CAPACITY,
    Append,
    Cache,
    same_bits,
    same_but_for_one_rounding,
    verify,
)
from ..oracle import Rule
from .on_cards import card

ARCHS = ("sm_90a", "sm_120a", "sm_121a")
CARDS = (*ARCHS, "sm_100a", "sm_103a")
CORE = ("paged_halves", "dense_interleaved", "ragged", "indexed_plain", "odd_stride", "fp8")


def question(cache: Cache) -> tuple[CacheUpdate, AttentionTensors]:
    """The call as the public function hands it on."""
    given = cache.arguments()
    tensors = AttentionTensors(
        q=cache.q,
        k=cache.k,
        v=cache.v,
        cu_seqlens_q=given.get("cu_seqlens_q"),
        seqused_k=cache.used,
        page_table=cache.table,
        kv_batch_idx=cache.rows,
        k_descale=given.get("k_descale"),
        v_descale=given.get("v_descale"),
    )
    update = CacheUpdate(
        k=cache.new_k,
        v=cache.new_v,
        cache_seqlens=cache.used,
        cu_seqlens_k_new=given.get("cu_seqlens_k_new"),
        rotary_cos=given.get("rotary_cos"),
        rotary_sin=given.get("rotary_sin"),
        rotary_interleaved=given.get("rotary_interleaved", True),
    )
    return update, tensors


def append(how: Append, cache: Cache, arch: str, schedule: int = 0) -> AttentionTensors:
    """Run the kernel on `cache`; the tensors as they are handed to the forward kernel."""
    update, tensors = question(cache)
    along = how.rule != Rule(causal=False)
    with ptx_emulator.session(arch, schedule=schedule, strict=True) as emulator:
        with kernels_on(emulator):
            append_plan.append(update, tensors, along)
        assert len(emulator.runs) == 1
    return tensors


def assert_right(how: Append, arch: str, schedule: int) -> None:
    cache = Cache(how)
    kept = cache.q.clone()
    expected_k, expected_v, queries, lengths = cache.expected()
    tensors = append(how, cache, arch, schedule)
    assert tensors.seqused_k.tolist() == lengths
    (same_but_for_one_rounding if how.fp8 else same_bits)(cache.v, expected_v)
    same_bits(cache.q, kept)
    if how.rotary is None:
        (same_but_for_one_rounding if how.fp8 else same_bits)(cache.k, expected_k)
        assert tensors.q is cache.q
        return
    same_but_for_one_rounding(cache.k, expected_k)
    for turned, truth in zip(cache.split_queries(tensors.q), queries, strict=True):
        same_but_for_one_rounding(turned, truth.to(how.dtype))


@pytest.mark.parametrize("name", APPENDS)
def test_append(name):
    """Every layout, table and stride of the CPU's tests; the cards take turns."""
    place = list(APPENDS).index(name)
    assert_right(APPENDS[name], CARDS[place % len(CARDS)], 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CORE)
def test_schedules(name, arch):
    """Eight orders of the warps and CTAs."""
    for schedule in range(8):
        assert_right(APPENDS[name], arch, schedule)


def test_nothing_is_written_beyond_the_capacity():
    """A GPU cannot check lengths without waiting: tokens past a sequence's room are dropped.

    They are no keys of the attention that follows.
    """
    how = APPENDS["dense_plain"]
    cache = Cache(how)
    cache.used[4] = CAPACITY - 2
    kept = cache.k.clone()
    lengths = append(how, cache, "sm_120a").seqused_k.tolist()
    assert lengths == [5, 6, 68, 69, CAPACITY, 0]
    same_bits(cache.k[4, CAPACITY - 2 :], cache.new_k[4, :2])
    same_bits(cache.k[4, : CAPACITY - 2], kept[4, : CAPACITY - 2])
    same_bits(cache.k[5], kept[5])


def test_no_page_beyond_the_table_is_read(fa4, monkeypatch):
    """Behind a sequence's row of the page table is the next one's, with its pages."""
    update = importlib.import_module(f"{fa4.__name__}.flash_attn4_cute.cache_update")
    monkeypatch.setattr(update, "_check_update_values", lambda *given: None)  # as on a GPU
    how = APPENDS["paged_plain"]
    cache = Cache(how)
    cache.table = torch.arange(2 * how.batch, dtype=torch.int32).view(how.batch, 2)
    cache.k, cache.v = cache.k.nan_to_num(), cache.v.nan_to_num()
    room = 2 * how.page_size
    cache.used = torch.tensor([0, room - 2, room, -1, 3, room - 5], dtype=torch.int32)
    with card(fa4, "sm_120a") as emulator:
        out, lse = cache.call(fa4)
    assert len(emulator.runs) == 2
    lengths = [5, room, room, 0, 8, room]
    ks, vs = (cache.sequences(which, lengths) for which in (0, 1))
    for b, (q, k, v) in enumerate(zip(cache.qs, ks, vs, strict=True)):
        acceptance.check(out[b], lse[b], acceptance.reference(q, k, v, how.rule), f"sequence {b}")


@pytest.mark.parametrize("unaligned", [False, True])
def test_strides_beyond_32_bits(unaligned):
    """FA#2662, FA#2214: a cache whose rows lie more than 2^31 elements apart."""
    how = APPENDS["dense_halves"]
    cache = Cache(how)
    expected_k, _, _, _ = cache.expected()
    apart = 2**31 // (len(BEFORE) - 3) + 8 + unaligned  # sequences 3 and up begin beyond 2^31
    store = torch.empty(len(BEFORE) * apart, dtype=how.dtype)  # 8 GiB, hardly touched
    strides = (apart, *cache.k.stride()[1:])
    far = store.as_strided(cache.k.shape, strides, storage_offset=int(unaligned))
    far.copy_(cache.k)
    cache.k = far
    append(how, cache, "sm_90a")
    same_but_for_one_rounding(far, expected_k)


@pytest.mark.parametrize(
    "name",
    [
        "paged_halves",
        "indexed_interleaved",
        "ragged",
        "ragged_dense",
        "band",
        "heads7",
        "fp8",
        "fp8_plain",
    ],
)
def test_append_then_attend(fa4, name):
    """The public function: both launches, the second on what the first left behind."""
    place = list(APPENDS).index(name)
    with card(fa4, ARCHS[place % 3], schedule=place % 8) as emulator:
        verify(fa4, APPENDS[name], "cpu")
    assert len(emulator.runs) >= 2
