"""The vLLM plugin's layer on a card, without vLLM: there, stand-ins take the place of its modules.

With vLLM itself the layer is tested on a CPU, in tests/vllm/test_layer.py, which also makes the
batches here. What a card adds: vLLM's cache layout in the GPU kernels, and a captured step.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import make_dataclass
from types import ModuleType
from typing import Generic, TypeVar

import pytest
import torch

from .conftest import ROOT
from .oracle import Rule

T = TypeVar("T")
FIELDS = (
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "block_table_tensor",
    "slot_mapping",
    "seq_lens_cpu_upper_bound",
)


class Generics(Generic[T]):
    """For AttentionImpl and AttentionMetadataBuilder: what they declare is of no matter here."""

    reorder_batch_threshold = None

    def __init__(self, *_):
        pass


def reshape_and_cache_flash(key, value, keys, values, slots, dtype, k_scale, v_scale):
    """vLLM's operator by its contract, in PyTorch: it writes tokens to their slots."""
    block_size = keys.shape[1]
    for new, cache, scale in ((key, keys, k_scale), (value, values, v_scale)):
        rows = new[: len(slots)]
        if dtype.startswith("fp8"):
            rows = (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(cache.dtype)
        cache[slots // block_size, slots % block_size] = rows


@pytest.fixture(scope="module")
def layers(fa4):
    """tests/vllm/test_layer.py, with the plugin imported on top of the stand-ins."""
    backend = ModuleType("vllm.v1.attention.backend")
    backend.AttentionBackend = object
    backend.AttentionImpl = backend.AttentionMetadataBuilder = Generics
    backend.AttentionType = type("AttentionType", (), {"DECODER": "decoder", "ENCODER_ONLY": "e"})
    backend.AttentionCGSupport = type("AttentionCGSupport", (), {"UNIFORM_BATCH": 2})
    backend.MultipleOf = int
    metadata = make_dataclass("CommonAttentionMetadata", [*FIELDS, ("causal", bool, True)])
    backend.CommonAttentionMetadata = metadata
    operators, logger = ModuleType("vllm._custom_ops"), ModuleType("vllm.logger")
    operators.reshape_and_cache_flash = reshape_and_cache_flash
    logger.init_logger = importlib.import_module("logging").getLogger
    packages = [ModuleType(name) for name in ("vllm", "vllm.v1", "vllm.v1.attention")]
    stand_ins = {module.__name__: module for module in (*packages, backend, operators, logger)}
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "integrations" / "vllm"))
    sys.modules.update(stand_ins)
    yield importlib.import_module("tests.vllm.test_layer")
    sys.path.remove(str(ROOT / "integrations" / "vllm"))
    for name in set(sys.modules) - before:
        if name.startswith(("vllm", "flash_attn_4_vllm", "tests.vllm")):
            del sys.modules[name]


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_a_mixed_batch(layers, device, split):
    with torch.device(device):
        made = layers.step(dtype=torch.bfloat16)
        metadata = layers.builder().build(0, made.common, fast_build=not split)
        assert (metadata.fresh is not None) == split
        layers.judge(made, layers.run(made, layers.layer(), metadata), Rule(causal=True))


@pytest.mark.gpu
def test_windows_and_sinks(layers, device):
    with torch.device(device):
        made = layers.step(dtype=torch.bfloat16)
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16)
        impl = layers.layer(sliding_window=6, sinks=sinks, logits_soft_cap=3.0)
        rule = Rule(causal=True, window=(5, 0), sink=sinks, softcap=3.0)
        layers.judge(made, layers.run(made, impl), rule)


@pytest.mark.gpu
def test_fp8_cache(layers, device):
    with torch.device(device):
        made = layers.step(dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn)
        metadata = layers.builder().build(0, made.common, fast_build=True)
        outs = layers.run(made, layers.layer(fp8=True), metadata)
        for xs, scale in ((made.keys, layers.K_SCALE), (made.values, layers.V_SCALE)):
            xs[:] = [
                ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
                for x in xs
            ]
        layers.judge(made, outs, Rule(causal=True))


@pytest.mark.gpu
def test_a_captured_step(layers, device):
    """Captured with one set of lengths, replayed with others; a request of the batch is padding."""
    with torch.device(device):
        made = layers.step(((1, 33), (1, 20), (1, 48), (0, 0)), dtype=torch.bfloat16)
        metadata = layers.builder().build_for_cudagraph_capture(made.common)
        impl = layers.layer()
        keys, values = list(made.keys), list(made.values)
        layers.judge(made, layers.run(made, impl, metadata), Rule(causal=True))  # compiles, too
        out = torch.full_like(made.q, torch.nan)
        call = (layers.scales(made.cache), made.q, *made.new, made.cache, metadata, out)
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                impl.forward(*call)
        for lengths in ([33, 20, 48, 0], [7, 20, 16, 0], [1, 1, 47, 0], [32, 17, 1, 0]):
            made.common.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
            made.keys = [x[:n] for x, n in zip(keys, lengths, strict=True)]
            made.values = [x[:n] for x, n in zip(values, lengths, strict=True)]
            out.fill_(torch.nan)
            graph.replay() if device.type == "cuda" else impl.forward(*call)
            layers.judge(made, [out[i : i + 1] for i in range(3)] + [out[3:3]], Rule(causal=True))
