"""Dense forward: every family of cases against the float64 oracle, on a CPU and on a GPU."""

import pytest
import torch

from . import acceptance, cases, harness, inputs
from .cases import BF16, F16, Case
from .oracle import Rule


def family(*names: str):
    """Parametrise by the cases of these families."""
    chosen = [case for name in names for case in cases.FAMILIES[name]]
    return pytest.mark.parametrize("case", chosen, ids=str)


@family("core")
def test_dtypes_head_dims_and_masks(fa4, device, case):
    harness.verify(fa4, case, device)


@family("windows")
def test_every_window_encoding(fa4, device, case):
    """TE#3528: an encoding of the window returned zeros."""
    harness.verify(fa4, case, device)


@family("query_boundaries")
def test_queries_around_a_tile(fa4, device, case):
    """FA#2091, FA#2301: rows just past a tile's boundary."""
    harness.verify(fa4, case, device)


@family("key_boundaries")
def test_keys_around_a_block_and_a_ring(fa4, device, case):
    """Partial last blocks; fewer blocks than stages, as many, and more than twice as many."""
    harness.verify(fa4, case, device)


@family("unequal_causal")
def test_causal_with_unequal_lengths(fa4, device, case):
    """Bottom-right alignment, and rows that see nothing: out = 0, LSE = -inf."""
    harness.verify(fa4, case, device)


@family("ratios")
def test_grouped_query_ratios(fa4, device, case):
    """FA#2504, FA#2258: ratios that do not divide a tile."""
    harness.verify(fa4, case, device)


@family("fills")
def test_values_beyond_normal_noise(fa4, device, case):
    """Peaked, outlier, constant, zero, far negative and huge inputs."""
    harness.verify(fa4, case, device)


@family("empty")
def test_nothing_to_do(fa4, device, case):
    """FA#2470, FA#2515: Sk = 0, Sq = 0, B = 0."""
    harness.verify(fa4, case, device)


@family("features")
def test_features(fa4, device, case):
    """softcap, sinks, alibi, d_v != d, head dimensions; what a GPU lacks is refused by name."""
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_without_lse(fa4, device, dtype):
    """The kernel that writes no LSE; the public functions then return a tensor alone."""
    case = Case(name="no_lse", dtype=dtype, return_lse=False, causal=True, seqlens_k=(200,))
    call = harness.build(case, device)
    assert isinstance(fa4.flash_attn_func(call.q, call.k, call.v, **call.options), torch.Tensor)
    harness.judge(call, harness.run(fa4, call))


@pytest.mark.parametrize("place", ["contiguous", "transposed", "padded"])
def test_out_is_written_in_place(fa4, device, place):
    """out= may have strides of its own; every element is written, and the result is out itself."""
    case = Case(name=f"out_{place}", causal=True, seqlens_q=(150,) * 2, seqlens_k=(140,) * 2)
    call = harness.build(case, device)
    blank = torch.full_like(call.q, float("nan"))
    out = inputs.PLACEMENTS[place](blank, blank, blank)[0]
    back, lse = fa4.flash_attn_func(
        call.q, call.k, call.v, out=out, return_lse=True, **call.options
    )
    assert back.data_ptr() == out.data_ptr() and back.stride() == out.stride()
    harness.judge(call, harness.cut(call, out, lse))


def test_out_leaves_its_neighbours_alone(fa4, device):
    """What lies between the rows of a strided out keeps its value."""
    call = harness.build(Case(name="out_neighbours", seqlens_q=(70,)), device)
    store = torch.full((1, 70, 5, 144), 7.0, dtype=BF16, device=device)
    fa4.flash_attn_func(call.q, call.k, call.v, out=store[:, :, :4, :128], **call.options)
    assert (store[:, :, 4] == 7).all() and (store[..., 128:] == 7).all()


def test_inputs_are_not_written(fa4, device):
    call = harness.build(Case(name="inputs_kept", causal=True), device)
    kept = [x.clone() for x in (call.q, call.k, call.v)]
    harness.run(fa4, call)
    for before, after in zip(kept, (call.q, call.k, call.v), strict=True):
        assert torch.equal(before, after)


def permutation(count: int, device: torch.device) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(3)).to(device)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("d", cases.CORE_HEAD_DIMS)
def test_fa2553_every_element_is_where_it_belongs(fa4, device, dtype, d):
    """FA#2553: right norm, wrong elements. Each query finds one key: out is its row of V."""
    count = 200
    order = permutation(count, device)
    codes = torch.randn(count, d, generator=torch.Generator().manual_seed(d)).to(device).sign()
    k = codes.to(dtype)[None, :, None, :]
    v = torch.randn(1, count, 1, d, device=device).to(dtype)
    q = k[:, order]
    # codes agree with themselves in d places and with others in far fewer: the rest weighs e^-40
    out = fa4.flash_attn_func(q, k, v, softmax_scale=100.0 / d)
    assert torch.equal(out, v[:, order])


@pytest.mark.parametrize("early", [0, 64, 130])
def test_fa2329_causal_softmax_is_carried_across_blocks(fa4, device, early):
    """FA#2329: the causal softmax was reset per block. One early key has all the weight here."""
    case = Case(name=f"early_{early}", causal=True, seqlens_q=(513,), seqlens_k=(513,), heads=2)
    call = harness.build(case, device)
    call.q += 1
    call.k[:, early] = 1
    call.sequences = tuple([x[0]] for x in (call.q, call.k, call.v))
    harness.judge(call, harness.run(fa4, call))


def test_fa2396_softcap_far_above_the_cap(fa4, device):
    """FA#2396: cap * tanh(x / cap), where every |x| is far above the cap."""
    case = Case(name="softcap_saturated", d=64, softcap=2.0, softmax_scale=20.0, fill="peaked")
    harness.verify(fa4, case, device)
    if device.type == "cpu":
        call = harness.build(case, device)
        _, lse = fa4.flash_attn_func(call.q, call.k, call.v, return_lse=True, **call.options)
        assert lse.abs().max() <= 2.0 + torch.log(torch.tensor(call.k.shape[1])) + 1e-4


@pytest.mark.parametrize("mask", cases.MASKS)
def test_te3216_outliers_in_a_batch(fa4, device, mask):
    """TE#3216: wrong only with a batch of two or more and activations that are not noise."""
    case = Case(
        name=f"te3216_{mask}", fill="outlier", seqlens_q=(257,) * 3, seqlens_k=(300,) * 3,
        **cases.MASKS[mask],
    )  # fmt: skip
    harness.verify(fa4, case, device)


@pytest.mark.parametrize("sq, sk", [(1, 1), (3, 700), (129, 64), (640, 640), (1000, 100)])
def test_fa2508_every_tile_is_computed(fa4, device, sq, sk):
    """FA#2508: tiles that no CTA took. Many heads and sequences, out poisoned beforehand."""
    case = Case(
        name=f"tiles_{sq}x{sk}", seqlens_q=(sq,) * 5, seqlens_k=(sk,) * 5, heads=7, heads_kv=1
    )
    call = harness.build(case, device)
    out = torch.full_like(call.q, float("nan"))
    _, lse = fa4.flash_attn_func(call.q, call.k, call.v, out=out, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    first = acceptance.reference(*(x[4, :, :1] for x in (call.q, call.k, call.v)), Rule())
    acceptance.check(out[4, :, :1], lse[4, :1], first, case.name)


def test_kernel_count_stays_small():
    """Cases share compiled kernels: a GPU run compiles each key once, at seconds a kernel.

    174 of them, those for many queries on e4m3 caches among them, took an H200's host 135 seconds
    with all tests, in 15 processes.
    """
    every = [case for members in cases.FAMILIES.values() for case in members]
    keys = {case.kernel_key for case in every if case.missing_on_gpu() is None}
    assert len(keys) <= 180
