"""Head dimensions: every row of tiles, and tensors narrower than their tiles."""

import pytest

from tests.cases import BF16, F16, Case

from .on_cards import ARCHS, verify

# (d, d_v): each row's own, and in between
DIMS = (
    (8, 8), (40, 24), (72, 80), (112, 104), (64, 128), (192, 128), (160, 192), (200, 256),
)  # fmt: skip


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_dims(fa4, dims):
    """Causal, a partial tile of rows and of keys; the cards and dtypes take turns."""
    turn = DIMS.index(dims)
    case = Case(
        name="dims", d=dims[0], d_v=dims[1], seqlens_q=(35,), seqlens_k=(70,), causal=True,
        heads=1, heads_kv=1, dtype=(BF16, F16)[turn % 2],
    )  # fmt: skip
    verify(fa4, case, ARCHS[turn % 3], (turn,))


@pytest.mark.parametrize("dims", [(80, 80), (256, 256)], ids=str)
def test_packed_dims(fa4, dims):
    """Packed sequences, an empty one between: rows behind a sequence belong to the next."""
    case = Case(
        name="packed_dims", d=dims[0], d_v=dims[1], layout="varlen", seqlens_q=(3, 0, 40),
        seqlens_k=(70, 9, 33), window=(30, 4), heads=2, heads_kv=1,
    )  # fmt: skip
    verify(fa4, case, "sm_121a", (0, 3))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dims", [(32, 192), (64, 128)])
def test_narrow_keys_of_minus_inf(fa4, dims, arch):
    """Decode widens the query to the values' tile with zeros; they must not meet the -inf again."""
    d, d_v = dims
    case = Case(
        name="narrow", d=d, d_v=d_v, fill="minus_inf", heads=2, heads_kv=1, seqlens_q=(1,),
        seqlens_k=(70,),
    )  # fmt: skip
    verify(fa4, case, arch)
