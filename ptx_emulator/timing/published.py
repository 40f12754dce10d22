"""What others measured: TFLOP/s of upstream's forward kernel, and where it is written down.

All from Dao-AILab/flash-attention pull request #2605 (2026-06), bf16, 32768 tokens in all, 2048
columns of heads (32 heads of 64 or 16 of 128). The thread has more than one table a card. These are
of the kernels as 4.0.0b36 ships them by default: a static persistent grid for dense problems, one
CTA a tile for causal ones. With cluster launch control, which b36 has off, the same thread has for
B200 d 64 dense 623, 758, 827, 868, 878: two schedulers of one kernel differ by up to 15 %.
The author's other threads (#2570, #2488) lock the clock of a B200 at 1755 MHz.
"""

from .grid import Problem
from .problems import Kernel

TOKENS, COLUMNS = 32768, 2048
SEQLENS = (1024, 2048, 4096, 8192, 16384)

# (arch, head_dim, causal) -> TFLOP/s at 1k, 2k, 4k, 8k, 16k
UPSTREAM: dict[tuple[str, int, bool], tuple[float, ...]] = {
    ("sm_100a", 64, False): (703, 734, 749, 757, 762),
    ("sm_100a", 64, True): (428, 586, 715, 801, 842),
    ("sm_100a", 128, False): (1196, 1266, 1309, 1357, 1401),
    ("sm_100a", 128, True): (704, 944, 1114),
    ("sm_103a", 64, False): (1086, 1172, 1210, 1234, 1240),
    ("sm_103a", 64, True): (543, 786, 1012, 1167, 1248),
    ("sm_103a", 128, False): (1538, 1703, 1806, 1849, 1886),
    ("sm_103a", 128, True): (829, 1167, 1444),
}

# cuDNN 9.22 (cudnn-frontend's figures, 2026-04): GB200 h64/8 d128 at 2k, 4k, 8k, 16k; for the plot.
CUDNN = {
    (128, True): (1097, 1408, 1574, 1708),
    (128, False): (1433, 1599, 1771, 1697),
}


def problem_of(head_dim: int, head_dim_v: int, causal: bool, seqlen: int) -> Problem:
    """The problem of the tables above."""
    heads = COLUMNS // head_dim if head_dim in (64, 128, 256) else 16
    batch = max(1, TOKENS // seqlen)
    return Problem(batch, seqlen, heads, heads, head_dim, head_dim_v, causal)


def points(arch: str) -> list[tuple[Kernel, Problem, float, bool]]:
    """(kernel, problem, TFLOP/s, whether it is fitted): every other of B200, none of GB300."""
    found: list[tuple[Kernel, Problem, float, bool]] = []
    for (where, d, causal), figures in UPSTREAM.items():
        if where != arch:
            continue
        for seqlen, figure in zip(SEQLENS, figures, strict=False):
            kernel = Kernel("upstream", arch, d, d, causal)
            fitted = arch == "sm_100a" and len(found) % 2 == 0
            found.append((kernel, problem_of(d, d, causal, seqlen), float(figure), fitted))
    return found
