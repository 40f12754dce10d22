"""AttentionProblem -> Plan: which kernel answers a question, with which tiles.

The plan is decided by the problem and the card alone, never by a tensor's values, so it is computed
once per problem. What the kernels cannot do is refused here, before anything is written.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import compiler
from .arguments import UNBOUNDED
from .checks import FP8
from .decode_plan import decode_plan, decodes, explain_decode, packed_rows
from .device import INSTRUCTIONS, Card, supported_card
from .kernel_keys import DecodeKey, ForwardKey
from .mask_rule import Band, band_of
from .problem import AttentionProblem, Layout
from .remember import PerProblem
from .rules import BandRule, ScoreRule
from .sm100 import tiles as sm100_tiles
from .sm100.fit import choose_splits, fitted
from .sm100.pairing import in_pairs
from .splits import MAX_SPLITS, choose_forward_splits, planned_length
from .tiles import FORWARD_ROWS, FP8_ROWS, ROWS_OF_VARIANT, TileConfig

MAX_HEAD_DIM = 256
AUX_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer: a kernel, and the scalars that the problem fixes.

    `band` tells which bounds the mask has; a bound that it does not have lies beyond all keys.
    """

    key: ForwardKey | DecodeKey
    window_left: int
    window_right: int
    band: tuple[bool, bool] = (False, False)
    max_ctas: int = UNBOUNDED
    misfits: tuple[tuple[str, str], ...] = ()
    num_splits: int = 1

    def explain(self) -> str:
        """What will run, for people."""
        key = self.key
        if isinstance(key, DecodeKey):
            kernel = explain_decode(key)
        else:
            cfg = key.cfg
            kernel = (
                f"kernel: {INSTRUCTIONS[key.family]} forward for {key.variant}, {key.dtype}, "
                f"head_dim up to {cfg.head_dim} and {cfg.head_dim_v} for v, "
                f"queries {key.q_layout.value}, keys {key.kv_layout.value}\n"
                f"tiles: {cfg.explain()}\n"
                f"scores: {', '.join(key.score.names()) or 'scaled dot products'}"
            )
        bounds = " and ".join(
            f"{name} {value}"
            for name, value, has in (
                ("left", self.window_left, self.band[0]),
                ("right", self.window_right, self.band[1]),
            )
            if has
        )
        copies = "".join(f"copied first: {name}, {why}\n" for name, why in self.misfits)
        mod = "" if key.rule.mask_mod is None else " and mask_mod"
        split = self.num_splits > 1
        mod += " and block lists" if key.rule.block_sparse else ""
        return (
            f"{kernel}\n"
            f"mask: {'band, ' + bounds if bounds else 'full'}{mod}\n"
            f"splits: {self.num_splits}{', merged by a launch of the same code' * split}\n"
            f"{copies}"
            f"code: {compiler.origin(key)}"
        )


@PerProblem
def make_plan(problem: AttentionProblem) -> Plan:
    """Choose the kernel for a problem on a CUDA device.

    Raises:
        NotImplementedError: the card or a feature that the GPU kernels do not have.
    """
    return plan_on(problem, supported_card(problem.device))


def plan_on(problem: AttentionProblem, card: Card) -> Plan:
    """The plan of a problem on `card`; see make_plan."""
    assert card.variant is not None, "supported_card has refused the others"
    if problem.kv_layout is not Layout.DENSE:  # where it is a bound, one plan serves many
        planned = planned_length(problem.seqlen_k)
        if planned != problem.seqlen_k:
            problem = replace(problem, seqlen_k=planned)
    cfg = row_for(card.variant, problem)
    for refusal in _refusals(problem, cfg is not None and cfg.is_general):
        raise NotImplementedError(refusal)
    assert cfg is not None, "the last row holds every head dimension that is not refused"
    band = band_of(problem.mask)
    left, right = (band.left, band.right) if isinstance(band, Band) else (None, None)
    # A bound at or beyond the longest sequence hides nothing: clamp it, so that sums with row and
    # key numbers stay far from 2^31. Rounded up, a launch is the same while lengths grow by steps.
    longest = problem.seqlen_q + problem.seqlen_k
    longest = max(longest, min(1 << longest.bit_length(), 1 << 30))
    shared: dict[str, Any] = {
        "window_left": longest if left is None else min(left, longest),
        "window_right": longest if right is None else min(right, longest),
        "band": (left is not None, right is not None),
        "misfits": problem.misfits,
    }
    rule = BandRule.of(problem)
    if decodes(problem, cfg.is_general):
        # Bounds beyond all keys cost nothing where blocks are read once: one kernel for all bands.
        both = replace(rule, has_left=True, has_right=True)
        decode_key, num_splits = decode_plan(problem, both, card)
        row_tiles = -(-packed_rows(problem) // decode_key.cfg.rows)
        _check_tiles(problem, row_tiles * problem.num_heads_kv * problem.batch)
        return Plan(key=decode_key, num_splits=num_splits, **shared)
    if isinstance(cfg, sm100_tiles.TileConfig):
        cfg = fitted(in_pairs(cfg, card.variant, problem), problem)
        num_splits = choose_splits(cfg, problem, card.num_sms)
    else:
        num_splits = _forward_splits(problem, cfg, card.num_sms)
    key = ForwardKey(
        variant=card.variant,
        dtype=problem.dtype,
        cfg=cfg,
        rule=rule,
        q_layout=problem.q_layout,
        kv_layout=problem.kv_layout,
        has_seqused_q=problem.has_seqused_q,
        has_seqused_k=problem.has_seqused_k,
        has_lse=problem.return_lse,
        has_kv_batch_idx=problem.has_kv_batch_idx,
        has_leftpad=problem.has_cache_leftpad,
        has_k_descale=problem.has_k_descale,
        has_v_descale=problem.has_v_descale,
        score=ScoreRule.of(problem),
        merged_dim=problem.head_dim_v if num_splits > 1 else 0,
    )
    tiles = _num_tiles(problem, cfg) * num_splits
    _check_tiles(problem, tiles)
    max_ctas = _max_ctas(key, tiles, num_splits, card.num_sms)
    return Plan(key=key, max_ctas=max_ctas, num_splits=num_splits, **shared)


def _num_tiles(p: AttentionProblem, cfg: TileConfig | sm100_tiles.TileConfig) -> int:
    """Tiles of queries, as many of each sequence as of the longest."""
    if isinstance(cfg, sm100_tiles.TileConfig):
        return p.batch * (p.num_heads // cfg.group) * -(-p.seqlen_q // cfg.block_tokens)
    return p.batch * p.num_heads * -(-p.seqlen_q // cfg.block_m)


def _check_tiles(p: AttentionProblem, tiles: int) -> None:
    """Kernels count tiles, and pairs of CTAs twice, in 32 bits."""
    if tiles >= 1 << 30:
        rule = f"{p.batch} sequences of so many queries are {tiles} tiles, a launch has below 2^30"
        raise NotImplementedError(
            _refuse("max_seqlen_q", p.seqlen_q, rule, "pass the length of the longest sequence")
        )


def _max_ctas(key: ForwardKey, tiles: int, num_splits: int, num_sms: int) -> int:
    """The most CTAs of a launch, UNBOUNDED for one a tile. One fits an SM.

    Where all sequences are equally long, each gets its share of tiles at the start. Else they take
    the next one from a counter if the kernel can and there is more than one for each; or the card
    hands it out wherever an SM is free.
    """
    if key.counts_tiles:
        return num_sms if tiles > num_sms else UNBOUNDED
    return UNBOUNDED if key.is_uneven or num_splits > 1 else num_sms


def forward_rows(variant: str) -> tuple[Any, ...]:
    """The tile configurations of a variant's own family, the narrowest first."""
    return sm100_tiles.FORWARD_ROWS.get(variant) or ROWS_OF_VARIANT.get(variant, FORWARD_ROWS)


def row_for(variant: str, p: AttentionProblem) -> TileConfig | sm100_tiles.TileConfig | None:
    """The narrowest row whose tiles hold the tensors of `p`, or None.

    Every card has mma.sync: its rows serve what the variant's own family has no tiles for, e4m3
    among it.
    """
    rows = FP8_ROWS if p.fp8_kv else (*forward_rows(variant), *FORWARD_ROWS)
    holding = (row for row in rows if row.holds(p.head_dim, p.head_dim_v))
    if p.page_size is not None:
        pages = (
            _paged(row, p.page_size) if isinstance(row, TileConfig) else row for row in holding
        )
        holding = (row for row in pages if row is not None)
    return next(holding, None)


@functools.lru_cache(maxsize=1024)
def _paged(row: TileConfig, page_size: int) -> TileConfig | None:
    return row.paged(page_size)


def _forward_splits(p: AttentionProblem, cfg: TileConfig, num_sms: int) -> int:
    """The number of splits of a launch of the mma.sync forward kernel."""
    if p.num_splits > 0 or p.block_size is not None:
        return min(max(p.num_splits, 1), MAX_SPLITS)
    return choose_forward_splits(_num_tiles(p, cfg), -(-p.seqlen_k // cfg.block_n), num_sms)


def _refusals(p: AttentionProblem, is_general: bool):
    """The reasons, in the user's words, why no GPU kernel answers `p`."""
    on_cpu = "or pass CPU tensors"
    if p.dtype not in (torch.float16, torch.bfloat16):
        yield _refuse("dtype", p.dtype, "the GPU kernels take float16 and bfloat16", "cast q, k, v")
    if p.fp8_kv and (p.head_dim % 16 or p.head_dim_v % 16):
        rule = "the GPU reads fp8 with head dimensions that are multiples of 16"
        yield _refuse("k.dtype, v.dtype", FP8, rule, f"convert them to q's dtype, {on_cpu}")
    for name, dim in (("head_dim", p.head_dim), ("head_dim_v", p.head_dim_v)):
        if dim % 8 or dim > MAX_HEAD_DIM:
            rule = f"the GPU kernels take multiples of 8 up to {MAX_HEAD_DIM}"
            yield _refuse(name, dim, rule, f"pad with zeros to a multiple of 8, {on_cpu}")
    if p.kv_layout is Layout.PAGED:
        for name, reason in p.misfits:
            if name in ("k", "v"):
                rule = "a paged cache is read where it is, for a copy at each call would cost more"
                yield _refuse(name, "a cache", f"{reason}; {rule}", "lay the cache out in 16 bytes")
    for i, (dtype, rank) in enumerate(p.aux):
        if dtype not in AUX_DTYPES or rank < 1:
            rule = "the GPU kernels read " + ", ".join(str(d)[6:] for d in AUX_DTYPES)
            yield _refuse(f"aux_tensors[{i}]", f"{dtype}, {rank} dimensions", rule, "convert it")
    if p.requires_grad:
        rule = "there is no backward pass on the GPU yet"
        yield _refuse("requires_grad", True, rule, f"call under torch.no_grad(), {on_cpu}")
    yield from _combinations(p, is_general)


def _combinations(p: AttentionProblem, is_general: bool):
    """Why none of the kernels does all of what `p` asks, if the forward kernel is (not) general."""
    packs = ("pack_gqa", p.pack_gqa is True)
    alone: tuple[tuple[str, object, bool, tuple], ...] = (
        ("dropout_p", p.dropout_p, p.dropout_p > 0.0, () if is_general else (packs,)),
        # Lists are of single heads: no kernel packs heads under them.
        ("block_sparse_tensors", "given", p.block_size is not None, (packs,)),
    )
    for name, value, given, others in alone:
        together = [other for other, is_asked in others if is_asked]
        if given and together:
            rule = f"not on this GPU together with {', '.join(together)}"
            yield _refuse(name, value, rule, "leave one of them out, or pass CPU tensors")


def _refuse(argument: str, value: object, rule: str, way_out: str) -> str:
    return f"{argument}={value} is not supported: {rule}; {way_out}"
