"""One test per message: it names argument, value and way out, and nothing has been written.

A message reads `argument=value: rule. Way out.`; the calls stand in error_cases.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import re

import numpy as np
import pytest
import torch

from .error_cases import CASES, CU_DOWN, SENTINEL, dense, metadata, varlen

KINDS = {kind.__name__: kind for kind in (TypeError, ValueError, NotImplementedError)}


@pytest.mark.parametrize("case", CASES)
def test_message(fa4, case):
    """The right exception, with argument, value, rule and way out; results and cache untouched."""
    (name, arguments), expected = CASES[case]
    kind, beginning, way_out = expected.split(" | ")
    with pytest.raises(KINDS[kind]) as caught:
        getattr(fa4, name)(**arguments)
    message = str(caught.value)
    assert type(caught.value).__name__ == kind
    assert message.startswith(beginning)
    assert way_out in message[len(beginning) :]
    for written in ("out", "k_cache", "v_cache"):
        tensor = arguments.get(written)
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and name != "merge":
            untouched = (tensor == SENTINEL).all()
            assert untouched or name == "flash_attn_with_kvcache" and arguments["k"] is None


def test_metadata_of_another_step(fa4):
    """Metadata made for other heads is refused, naming the field."""
    made = fa4.get_scheduler_metadata(**metadata(headdim=8)[1])
    name, arguments = dense(scheduler_metadata=made)
    with pytest.raises(
        ValueError, match=r"scheduler_metadata.head_dim=8: the call has head_dim 16"
    ):
        getattr(fa4, name)(**arguments)
    made = fa4.get_scheduler_metadata(**metadata(num_splits=2)[1])
    name, arguments = dense(scheduler_metadata=made, num_splits=3)
    with pytest.raises(ValueError, match=r"num_splits=3: .* 2 splits\. Pass num_splits=0"):
        getattr(fa4, name)(**arguments)


@pytest.mark.parametrize(
    "function", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
)
def test_arguments_never_shift(fa4, function):
    """Nothing after the tensors can be passed by position, and unknown names are refused."""
    name, arguments = dense()
    tensors = [arguments["q"], arguments["k"], arguments["v"]]
    too_many = {"flash_attn_func": 0, "flash_attn_varlen_func": 4, "flash_attn_with_kvcache": 2}
    with pytest.raises(TypeError, match="positional argument"):
        getattr(fa4, function)(*tensors, *[None] * too_many[function], 0.5)
    with pytest.raises(TypeError, match="argument 'softmax_scal'. Did you mean softmax_scale"):
        getattr(fa4, function)(*tensors, softmax_scal=0.2)
    with pytest.raises(TypeError, match="argument 'xyz'. It takes q, k"):
        getattr(fa4, function)(*tensors, xyz=None)


def test_arrays_are_no_bools(fa4):
    """In our words, not NumPy's."""
    name, arguments = dense(causal=np.array([True, False]))
    with pytest.raises(TypeError, match=re.escape("causal=array([ True, False]): must be True or")):
        getattr(fa4, name)(**arguments)


def test_functions_are_called_by_position(fa4):
    """What has to be passed by name is bound before."""

    def banded(b, h, i, j, info, aux, *, width):
        return j <= i + width

    name, arguments = dense(mask_mod=banded)
    with pytest.raises(TypeError, match="mask_mod=.*banded, .* needs width by name: .*partial"):
        getattr(fa4, name)(**arguments)
    arguments["mask_mod"] = functools.partial(banded, width=1)
    getattr(fa4, name)(**arguments)


def test_errors_survive_compilation(fa4):
    """The operator refuses what the eager call refuses, with the same words."""
    torch._dynamo.reset()
    compiled = torch.compile(fa4.flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    _, arguments = varlen(cu_seqlens_q=CU_DOWN, out=None)
    with pytest.raises(ValueError, match=re.escape("cu_seqlens_q[2]=6: must not be below")):
        compiled(**arguments)


# What a GPU refuses, judged without one: the plan is asked, with a card of our choice.


@pytest.fixture
def card(fa4, monkeypatch):
    """Pretend that every CUDA device has the given compute capability."""
    plan = __import__(f"{fa4.__name__}.flash_attn4_cute.plan", fromlist=["plan"])
    device = __import__(f"{fa4.__name__}.flash_attn4_cute.device", fromlist=["device"])

    def pretend(capability):
        plan.make_plan.cache_clear()
        found = device.Card("Pretended card", capability, 132)
        monkeypatch.setattr(device, "card", lambda _: found)
        return plan

    yield pretend
    plan.make_plan.cache_clear()


def gpu_problem(fa4, **changes):
    """A problem that the GPU kernels solve, but for `changes`, as if its tensors were on a GPU."""
    problem = fa4.flash_attn4_cute.problem
    q = torch.empty(1, 128, 4, 64, dtype=torch.bfloat16)
    options = problem.AttentionOptions(mask=problem.Band(None, 0))
    on_cpu = problem.AttentionProblem.from_tensors(problem.AttentionTensors(q=q, k=q, v=q), options)
    return dataclasses.replace(on_cpu, device=torch.device("cuda", 0), **changes)


def test_unsupported_gpu(fa4, card):
    """Needs ..., found ..., use ..."""
    plan = card((7, 5))
    with pytest.raises(NotImplementedError) as caught:
        plan.make_plan(gpu_problem(fa4))
    assert re.search(r"needs .*12\.0.*found 7\.5 \(Pretended card\).*CPU", str(caught.value))


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"dtype": torch.float32}, "dtype=torch.float32"),
        ({"head_dim": 68}, "head_dim=68"),
        ({"head_dim_v": 264}, "head_dim_v=264"),
        ({"requires_grad": True}, "requires_grad=True"),
        ({"aux": ((torch.complex64, 2),)}, "aux_tensors[0]=torch.complex64"),
    ],
    ids=["float32", "head_dim", "head_dim_v", "requires_grad", "aux_tensors"],
)
def test_what_the_gpu_kernels_cannot_do(fa4, card, changes, beginning):
    """Refused by name and value, with a way out; nothing falls to another path silently."""
    plan = card((12, 0))
    assert plan.make_plan(gpu_problem(fa4)) is not None
    with pytest.raises(NotImplementedError) as caught:
        plan.make_plan(gpu_problem(fa4, **changes))
    message = str(caught.value)
    assert message.startswith(beginning)
    assert ";" in message or ". " in message


@pytest.mark.parametrize(
    ("capability", "family"), [((9, 0), "sm120"), ((10, 0), "sm100"), ((12, 1), "sm120")]
)
def test_block_lists_go_to_a_kernel_that_follows_them(fa4, card, capability, family):
    """Another kernel would compute every block in silence."""
    plan = card(capability)
    chosen = plan.make_plan(gpu_problem(fa4, block_size=(128, 128)))
    assert chosen.key.family == family and "block lists" in chosen.explain()
    problem = gpu_problem(fa4, block_size=(128, 128), pack_gqa=True)
    with pytest.raises(NotImplementedError, match="block_sparse_tensors=given .*pack_gqa"):
        plan.make_plan(problem)


@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_rows_choose_the_kernel_for_pages_and_splits(fa4, card, capability):
    """Few queries decode; many take the forward kernel."""
    plan = card(capability)
    layout = fa4.flash_attn4_cute.problem.Layout
    pages = {"kv_layout": layout.PAGED, "page_size": 16, "seqlen_k": 4096, "has_seqused_k": True}
    for asked in (pages, {"num_splits": 3}, pages | {"num_splits": 3, "dropout_p": 0.1}):
        few, many = (
            plan.make_plan(gpu_problem(fa4, seqlen_q=tokens, **asked)) for tokens in (64, 65)
        )
        decodes = "dropout_p" not in asked
        assert ("decode" in few.explain()) == decodes and "mma.sync forward" in many.explain()
        assert ("keys in boxes of 16" in many.explain()) == ("page_size" in asked)
        assert many.key.merged_dim == 64
        assert many.num_splits >= asked.get("num_splits", 2)  # 4 tiles leave most of 132 SMs idle


def test_missing_cutlass(fa4, monkeypatch):
    """Says which package is missing and how to install it, and that only this kernel needs it."""
    compiler = __import__(f"{fa4.__name__}.flash_attn4_cute.compiler", fromlist=["compiler"])
    real_import = builtins.__import__

    def without_cutlass(name, *arguments, **keywords):
        if name.split(".")[0] == "cutlass":
            raise ImportError("No module named 'cutlass'")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_cutlass)
    rule = "not among the precompiled.*nvidia-cutlass-dsl.*pip install nvidia-cutlass-dsl"
    with pytest.raises(ImportError, match=rule):
        compiler.load_cutlass()


def test_nothing_on_the_cpu_imports_cutlass(build):
    """The cpu variant works where nvidia-cutlass-dsl is not installed."""
    import subprocess
    import sys

    program = f"""
import sys, torch
sys.modules["cutlass"] = None
from pathlib import Path
from kernels import get_local_kernel
fa4 = get_local_kernel(Path({str(build)!r}))
q = torch.rand(1, 4, 2, 8, requires_grad=True)
fa4.flash_attn_func(q, q, q, causal=True).sum().backward()
fa4.describe(), fa4.explain(q, q, q)
print(q.grad.isfinite().all().item())
"""
    if torch.cuda.is_available():
        pytest.skip("this PyTorch picks the CUDA variant")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
