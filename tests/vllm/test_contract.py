"""The plugin against each release of vLLM whose contract is recorded, installed or not."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import flash_attn_4_vllm
import pytest
import vllm
from flash_attn_4_vllm import cache
from flash_attn_4_vllm.backend import FlashAttn4Backend
from flash_attn_4_vllm.impl import FlashAttn4Impl
from flash_attn_4_vllm.metadata import FlashAttn4MetadataBuilder

from .contract import MODULES, contract, recorded

RELEASES = recorded()
BACKEND = "vllm/v1/attention/backend.py"
SOURCES = sorted(Path(flash_attn_4_vllm.__file__).parent.glob("*.py"))
CLASSES = {
    FlashAttn4Backend: ("AttentionBackend",),
    FlashAttn4MetadataBuilder: ("AttentionMetadataBuilder",),
    FlashAttn4Impl: ("AttentionImpl", "AttentionImplBase"),
}
# Ours alone: the layer's attributes, and what vLLM calls without declaring it in AttentionImpl.
UNDECLARED = {"do_kv_cache_update"}


def test_the_installed_release_is_recorded():
    """It also shows that what was recorded is what the sources say."""
    assert contract(Path(vllm.__file__).parents[1]) == RELEASES[vllm.__version__.split("+")[0]]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("ours", CLASSES, ids=lambda ours: ours.__name__)
def test_methods_take_what_vllm_passes(release, ours):
    bases = [RELEASES[release][BACKEND][name] for name in CLASSES[ours]]
    declared = {name: names for base in bases for name, names in base["methods"].items()}
    fields = {name for base in bases for name in base["fields"]}
    for name, member in vars(ours).items():
        function = getattr(member, "__func__", member)
        if not inspect.isfunction(function):
            of_python = name.startswith("__") or name == "_abc_impl"
            assert of_python or name in fields, f"{name} is no field of vLLM's"
        elif name in declared:
            parameters = inspect.signature(function).parameters
            kinds = {parameter.kind for parameter in parameters.values()}
            named = list(parameters)
            theirs = declared[name]
            if inspect.Parameter.VAR_POSITIONAL in kinds:
                named = [n for n in named if parameters[n].kind.name == "POSITIONAL_OR_KEYWORD"]
                theirs = theirs[: len(named)]
            assert named[: len(theirs)] == theirs, name
        else:
            assert name.startswith("_") or name in UNDECLARED, f"vLLM does not call {name}"


@pytest.mark.parametrize("release", RELEASES)
def test_imports_and_fields_exist(release):
    """Whatever the plugin imports from vLLM, and reads of CommonAttentionMetadata."""
    common = set(RELEASES[release][BACKEND]["CommonAttentionMetadata"]["fields"])
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                path = f"{node.module.replace('.', '/')}.py"
                assert path in MODULES, f"{source.name}: record {path} too"
                names = {alias.name for alias in node.names} - {"AttentionBackendEnum"}
                assert names <= set(RELEASES[release][path]["names"]), source.name
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "common"
            ):
                assert node.attr in common, f"{source.name}: common.{node.attr}"


@pytest.mark.parametrize("release", RELEASES)
def test_functions_that_are_called(release):
    found = RELEASES[release]
    write = found["vllm/_custom_ops.py"]["reshape_and_cache_flash"]
    assert write == [
        "key",
        "value",
        "key_cache",
        "value_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
        "v_scale",
    ]
    assert list(inspect.signature(cache.write_cache).parameters)[3:] == ["cache_dtype", "scales"]
    register = found["vllm/v1/attention/backends/registry.py"]["register_backend"]
    assert register[:2] == ["backend", "class_path"]


@pytest.mark.parametrize("release", RELEASES)
def test_the_shim_takes_what_vllm_passes(kernel, release):
    found = RELEASES[release]["vllm/vllm_flash_attn/flash_attn_interface.py"]
    assert found["results of _flash_attn_fwd"] == 4
    ours = set(inspect.signature(kernel._flash_attn_fwd).parameters) | {"fp8_kv_dequant"}
    # None of these is passed in a plain call, and each is refused by its name where it is.
    refused = set(found["keywords of _flash_attn_fwd"]) - ours
    assert refused <= {
        "qv",
        "gather_kv_indices",
        "gather_kv_valid_length",
        "dynamic_causal",
        "aux_tensor_leading_dims",
        "q_descale",
        "output_scale",
    }
