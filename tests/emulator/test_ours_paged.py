"""Keys in pages: any size, any order, garbage wherever nothing may look.

Few query rows take the decode kernel, many (PREFILL) the forward kernel.
"""

from dataclasses import replace

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli.case import Case, Inputs, judge

from .decoding import attend, case

JUNK = 2**31 - 1
LENGTHS = (300, 0, 65, -1, 1, 128)
CHUNK_LENGTHS = (150, 0, 65, -1)
PREFILL = {"heads": 2, "kv_heads": 1, "seqlen_q": 66}


def cut_into_pages(sequences, size: int, width: int, interleaved: bool = False):
    """(k pages, v pages, table) of sequences [(k, v)], each (n, h, d): shuffled pages, NaN between.

    `interleaved` is vLLM's cache: (pages, h, page_size, d + d_v), of which k and v are views.
    """
    counts = [-(-len(k) // size) for k, _ in sequences]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.full((len(sequences), width), JUNK, dtype=torch.int32)
    table[:, -1] = -1
    first = sequences[0]
    (heads, d), d_v = first[0].shape[1:], first[1].shape[-1]
    shape = (len(order), heads, size, d + d_v)
    cache = torch.full(shape, torch.nan, dtype=first[0].dtype)
    for row, (k, v) in enumerate(sequences):
        for page in range(counts[row]):
            table[row, page] = order.pop()
            tokens = slice(page * size, (page + 1) * size)
            both = torch.cat([k[tokens], v[tokens]], -1).transpose(0, 1)
            cache[table[row, page], :, : both.shape[1]] = both
    pages_k, pages_v = cache.transpose(1, 2).split([d, d_v], -1)
    if not interleaved:
        pages_k, pages_v = pages_k.contiguous(), pages_v.contiguous()
    return pages_k, pages_v, table


def draw(question: Case, lengths=LENGTHS):
    """(q, [(k, v)]) of normal numbers."""
    gen = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(size, generator=gen).to(question.dtype)

    q = normal(len(lengths), question.seqlen_q, question.heads, question.head_dim)
    heads, d, d_v = question.kv_heads, question.head_dim, question.head_dim_v
    return q, [(normal(max(n, 0), heads, d), normal(max(n, 0), heads, d_v)) for n in lengths]


def assert_right(question: Case, arch: str, schedules, size: int, interleaved: bool = False):
    from flash_attn4_cute.mask_rule import Band
    from flash_attn4_cute.problem import AttentionOptions, AttentionTensors

    question = replace(question, right=0)
    kernel, lengths = "DecodeKey", LENGTHS
    if question.seqlen_q > 64:
        kernel, lengths = "ForwardKey", CHUNK_LENGTHS
    q, sequences = draw(question, lengths)
    width = -(-max(lengths) // size) + 2
    pages_k, pages_v, table = cut_into_pages(sequences, size, width, interleaved)
    options = AttentionOptions(
        mask=Band(question.left, 0), num_splits=question.num_splits, return_lse=True
    )
    for schedule in schedules:
        tensors = AttentionTensors(
            q=q,
            k=pages_k,
            v=pages_v,
            page_table=table,
            seqused_k=torch.tensor(lengths, dtype=torch.int32),
        )
        with ptx_emulator.session(arch, schedule=schedule, strict=True) as emulator:
            out, lse = attend(emulator, tensors, options, kernel)
        for b, (k, v) in enumerate(sequences):
            ends = (torch.tensor([0, question.seqlen_q]), torch.tensor([0, len(k)]))
            one = Inputs(
                q=q[b : b + 1], k=k[None], v=v[None], sink=None, cu_q=ends[0], cu_k=ends[1]
            )
            alone = replace(question, batch=1, seqlen_k=len(k))
            verdict = judge(alone, one, out[b : b + 1], lse[b : b + 1])
            assert verdict.ok, f"schedule {schedule}, sequence {b}: {verdict}"


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a", "sm_121a"])
def test_core(arch):
    """Pages of 16 keys, split three ways, under eight schedules."""
    assert_right(case(num_splits=3), arch, range(8), size=16)


@pytest.mark.parametrize("size", [1, 3, 8, 32, 64, 96, 128, 256])
def test_page_sizes(size):
    """Boxes of 1, 8, 32 and 64 rows; pages smaller and larger than a block, and neither."""
    assert_right(case(num_splits=1, seqlen_q=2), "sm_120a", (0, 4), size=size)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(96, 96), (128, 128), (192, 128), (72, 40)])
@pytest.mark.parametrize("size", [5, 16])
def test_dims(head_dim, head_dim_v, size):
    """Rows of 64 bytes and odd boxes; head dimensions that fill no tile."""
    question = case(head_dim=head_dim, head_dim_v=head_dim_v, num_splits=2, left=90)
    assert_right(question, "sm_121a", (0, 2), size=size)


def test_vllm_cache():
    """K and V side by side in one cache, heads before tokens."""
    assert_right(case(num_splits=2), "sm_120a", (0, 3), size=16, interleaved=True)


@pytest.mark.parametrize(("arch", "schedules"), [("sm_120a", (0, 1, 2)), ("sm_121a", (3, 4))])
def test_prefill(arch, schedules):
    """Chunks of 66 tokens over pages of 16 keys, split three ways."""
    assert_right(case(num_splits=3, **PREFILL), arch, schedules, size=16)


@pytest.mark.parametrize("size", [1, 24, 256])
def test_prefill_page_sizes(size):
    """Boxes of 1, 24 and 32 rows."""
    assert_right(case(num_splits=1, **PREFILL), "sm_120a", (4,), size=size)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "size"), [(96, 96, 5), (72, 40, 16), (128, 128, 16), (192, 128, 5)]
)
def test_prefill_dims(head_dim, head_dim_v, size):
    """Rows of 64 bytes and odd boxes; head dimensions that fill no tile."""
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    question = case(num_splits=2, left=90, **dims, **PREFILL)
    assert_right(question, "sm_121a", (2,), size=size)


def test_prefill_vllm_cache():
    """K and V side by side in one cache, heads before tokens."""
    assert_right(case(num_splits=2, **PREFILL), "sm_90a", (0, 3), size=16, interleaved=True)


def test_shared_pages():
    """Sequences with a common prefix read the same pages."""
    from flash_attn4_cute.problem import AttentionOptions, AttentionTensors

    question = case(heads=2)
    q, sequences = draw(question, (150, 150))
    pages_k, pages_v, table = cut_into_pages(sequences, 32, 5)
    table[1, :3] = table[0, :3]
    tensors = AttentionTensors(
        q=q,
        k=pages_k,
        v=pages_v,
        page_table=table,
        seqused_k=torch.tensor([150, 150], dtype=torch.int32),
    )
    with ptx_emulator.session("sm_120a", schedule=1, strict=True) as emulator:
        out, lse = attend(emulator, tensors, AttentionOptions(num_splits=2, return_lse=True))
    for b in range(2):
        parts = [torch.cat([sequences[0][i][:96], sequences[b][i][96:]]) for i in range(2)]
        ends = (torch.tensor([0, 1]), torch.tensor([0, 150]))
        one = Inputs(
            q=q[b : b + 1],
            k=parts[0][None],
            v=parts[1][None],
            sink=None,
            cu_q=ends[0],
            cu_k=ends[1],
        )
        alone = replace(question, batch=1, seqlen_k=150)
        assert judge(alone, one, out[b : b + 1], lse[b : b + 1]).ok
