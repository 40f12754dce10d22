"""vLLM's choice of a backend on CUDA cards, run without one: its code, with the card made up."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import flash_attn_4_vllm
import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig

CARDS = [(9, 0), (10, 0), (10, 3), (10, 7), (12, 0), (12, 1), (12, 2)]
ASKED = AttentionSelectorConfig(
    head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
)


@pytest.fixture
def choose(monkeypatch):
    """choose(card, config, name) -> the class that vLLM's CUDA platform would import."""
    extension = "vllm._C_stable_libtorch"
    monkeypatch.setitem(sys.modules, extension, ModuleType(extension))
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    flash_attn_4_vllm.register()

    def chosen(card, config=ASKED, name=flash_attn_4_vllm.NAME):
        capability = classmethod(lambda cls, device_id=0: DeviceCapability(*card))
        monkeypatch.setattr(NonNvmlCudaPlatform, "get_device_capability", capability)
        return NonNvmlCudaPlatform.get_attn_backend_cls(AttentionBackendEnum[name], config)

    return chosen


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card[0]}.{card[1]}")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 64, "dtype": torch.float16},
        {"head_size": 256, "has_sliding_window": True},
        {"has_sink": True, "block_size": 16},
        {"kv_cache_dtype": "fp8"},
        {"use_non_causal": True},
        {"attn_type": "encoder_only", "kv_cache_dtype": None},
    ],
    ids=str,
)
def test_chosen_on_every_card(choose, card, changes):
    assert choose(card, ASKED._replace(**changes)) == flash_attn_4_vllm.BACKEND


def test_in_the_place_of_vllms_own(choose, monkeypatch):
    """The switch for who cannot pass --attention-backend."""
    flash_attn = AttentionBackendEnum.FLASH_ATTN
    assert not flash_attn.is_overridden()
    monkeypatch.setenv(flash_attn_4_vllm.REPLACES, "FLASH_ATTN,CPU_ATTN")
    flash_attn_4_vllm.register()
    try:
        assert choose((12, 0), name="FLASH_ATTN") == flash_attn_4_vllm.BACKEND
    finally:
        flash_attn.clear_override()


def test_another_plugins_backend_is_left_alone():
    custom = AttentionBackendEnum.CUSTOM
    register_backend(custom, "another.plugin.Backend")
    try:
        flash_attn_4_vllm.register()
        assert custom.get_path() == "another.plugin.Backend"
    finally:
        register_backend(custom, flash_attn_4_vllm.BACKEND)


@pytest.mark.parametrize(
    "card, changes, reason",
    [
        ((8, 0), {}, "compute capability not supported"),
        ((11, 0), {}, "compute capability not supported"),
        ((10, 1), {}, "compute capability not supported"),
        ((12, 0), {"head_size": 512}, "head_size not supported"),
        ((12, 0), {"head_size": 72, "kv_cache_dtype": "fp8"}, "multiple of 16, not 72"),
        ((12, 0), {"kv_cache_dtype": "float16"}, "needs a model of that dtype"),
        ((12, 0), {"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ((12, 0), {"dtype": torch.float32}, "dtype not supported"),
        ((12, 0), {"block_size": 8}, "block_size not supported"),
        ((12, 0), {"use_mla": True}, "MLA not supported"),
        ((12, 0), {"use_dcp": True}, "DCP not supported"),
        ((12, 0), {"use_batch_invariant": True}, "batch invariance not supported"),
    ],
    ids=str,
)
def test_refused_with_the_reason(choose, card, changes, reason):
    with pytest.raises(ValueError, match=reason):
        choose(card, ASKED._replace(**changes))


def test_cards_are_those_of_the_kernel(kernel):
    """The plugin is asked before it has loaded the kernel, and says what the kernel would."""
    from flash_attn_4_vllm.backend import FlashAttn4Backend

    card = sys.modules[f"{kernel.__name__}.flash_attn4_cute.device"].Card
    for capability in itertools.starmap(
        DeviceCapability, itertools.product(range(8, 14), range(9))
    ):
        admitted = FlashAttn4Backend.supports_compute_capability(capability)
        assert admitted == (card("", tuple(capability), 1).variant is not None), capability


def test_an_unknown_name_is_said(monkeypatch):
    monkeypatch.setenv(flash_attn_4_vllm.REPLACES, "FLASH_ATN")
    with pytest.raises(ValueError, match="FLASH_ATTN_4_REPLACES=FLASH_ATN: .*FLASH_ATTN,"):
        flash_attn_4_vllm.register()
