"""A gang: warps of one CTA at the same place in the program, executed together.

Registers are NumPy arrays with 32 lanes a warp, or NumPy scalars where all lanes agree. They are
never changed in place, so gangs share them when they part. Warps that diverge from each other part
(unless the divergent region is short and cannot wait); lanes of a warp that diverge are masked and
meet again at the branch's immediate post-dominator.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..findings import Unmodelled
from .async_ops import AsyncOp
from .barriers import MBarrier

if TYPE_CHECKING:
    from .cta import Cta

BLOCKED = -1


class Gang:
    """State of the warps `warps` (numbers within the CTA, ascending)."""

    def __init__(self, cta: "Cta", warps: np.ndarray, registers: list[Any]) -> None:
        self.cta = cta
        self.warps = warps
        self.lanes = 32 * len(warps)
        self.R = registers
        self.pc = 0
        self.mask: np.ndarray | None = None
        # innermost last: [reconvergence block, mask there, [(block, mask) still to run]]
        self.stack: list[tuple[int, Any, list[tuple[int, Any]]]] = []
        self.ready = True
        self.done = False
        self.reason = ""  # what it waits for
        self.awaited: list[tuple[MBarrier, int]] = []
        self.copies: list[AsyncOp] = []  # cp.async since the last commit_group
        self.copy_groups: list[list[AsyncOp]] = []
        self.bulk: list[AsyncOp] = []
        self.bulk_groups: list[list[AsyncOp]] = []
        self.products: list[AsyncOp] = []  # wgmma in flight, and those that end a group
        self.product_groups: list[list[AsyncOp]] = []
        self.cluster_phase = 0  # of barrier.cluster, at the last arrival
        self._special: dict[str, Any] = {}

    # ---- identity ----
    def special(self, name: str) -> Any:
        """A special register: a scalar, or one value a lane."""
        if name not in self._special:
            self._special[name] = self.cta.special(name, self.warps)
        value = self._special[name]
        return value() if callable(value) else value

    @property
    def name(self) -> str:
        first, last = int(self.warps[0]), int(self.warps[-1])
        span = f"warp {first}" if first == last else f"warps {first}-{last}"
        return f"CTA {self.cta.ctaid} {span}"

    # ---- waiting ----
    def wake(self) -> None:
        self.ready = True
        self.awaited.clear()

    def block(self, pc: int, reason: str) -> int:
        """Stop at block `pc` until something wakes the gang."""
        self.pc, self.ready, self.reason = pc, False, reason
        self.cta.machine.times_blocked[self.warps] += 1
        return BLOCKED

    def spin(self, again: Any, after: int, here: int) -> int:
        """End of a block that repeats itself while `again`."""
        again = self.among_active(again)
        waiting = int(np.count_nonzero(again))
        if waiting == 0:
            self.awaited.clear()
            return after
        by_warp = again.reshape(-1, 32).any(axis=1)
        if not by_warp.all() and not self.stack:
            rest = self.part(np.flatnonzero(by_warp), here)
            rest.wait_for(self.awaited)
            rest.block(here, self.barriers_awaited())
            self.awaited.clear()
            self.pc = after
            self.cta.machine.add(rest)
            return BLOCKED
        self.wait_for(self.awaited)
        return self.block(here, self.barriers_awaited())

    def barriers_awaited(self) -> str:
        return "; ".join(
            f"parity {parity} of {bar.name} (phase {bar.phase})" for bar, parity in self.awaited
        )

    def wait_for(self, awaited: Iterable[tuple[MBarrier, int]]) -> None:
        self.awaited = list(awaited)
        for barrier, _ in self.awaited:
            if self not in barrier.waiters:
                barrier.waiters.append(self)

    def end(self) -> None:
        """All warps have come to the end of the program."""
        self.done, self.ready = True, False
        if self.cta.race is not None:
            stores = [*self.bulk, *(op for group in self.bulk_groups for op in group)]
            self.cta.race.ended(self.warps, [op.mark for op in stores])

    # ---- divergence ----
    def among_active(self, condition: Any) -> np.ndarray:
        """`condition` as one value a lane, False in inactive lanes."""
        full = np.broadcast_to(condition, self.lanes)
        return full if self.mask is None else full & self.mask

    def branch(self, taken: Any, targets: tuple[int, int], reconverge: int, may_wait: bool) -> int:
        """The next block after a branch whose condition is `taken`."""
        yes = self.among_active(taken)
        count = int(np.count_nonzero(yes))
        total = self.lanes if self.mask is None else int(np.count_nonzero(self.mask))
        if total == 0:  # warps that came along into a region in which they have no lane
            return self.stack[-1][0]
        if count == total:
            return targets[0]
        if count == 0:
            return targets[1]
        by_warp = yes.reshape(-1, 32).any(axis=1)
        if may_wait and len(self.warps) > 1:
            no = ~yes if self.mask is None else self.mask & ~yes
            mixed = by_warp & no.reshape(-1, 32).any(axis=1)
            group: Any = mixed if mixed.any() and not mixed.all() else by_warp
            if group.all():
                group = np.arange(len(self.warps)) == 0
            return self._part_at_branch(taken, group, (targets, reconverge))
        no = ~yes if self.mask is None else self.mask & ~yes
        if targets[1] == reconverge:
            order = [(targets[0], yes)]
        elif targets[0] == reconverge:
            order = [(targets[1], no)]
        else:
            order = [(targets[0], yes), (targets[1], no)]
        self.stack.append((reconverge, self.mask, order[1:]))
        self.pc, self.mask = order[0]
        return order[0][0]

    def _part_at_branch(self, taken: Any, group: Any, where: tuple[Any, int]) -> int:
        """Part the warps in `group` from the others and decide the branch for each."""
        targets, reconverge = where
        taken = np.broadcast_to(taken, self.lanes)
        lanes = np.repeat(group, 32)
        other = self.part(np.flatnonzero(group), self.pc)
        for gang, condition in ((other, taken[lanes]), (self, taken[~lanes])):
            following = gang.branch(condition, targets, reconverge, True)
            if following != BLOCKED:
                gang.arrive_at(following)
        self.cta.machine.add(other)
        return BLOCKED

    def arrive_at(self, block: int) -> None:
        """Continue at `block`; where a divergent region ends there, take its next part."""
        self.pc = block
        while self.stack and self.stack[-1][0] == self.pc:
            reconverge, mask, rest = self.stack[-1]
            if rest:
                self.pc, self.mask = rest.pop()
                if self.pc != reconverge:
                    return
            else:
                self.stack.pop()
                self.mask = mask

    def part(self, positions: np.ndarray, pc: int) -> "Gang":
        """Take the warps at `positions` out into a new gang that continues at `pc`."""
        self.settle()
        keep = np.setdiff1d(np.arange(len(self.warps)), positions)
        other = Gang(self.cta, self.warps[positions], self._select(positions))
        other.pc = pc
        other.mask = _lanes_of(self.mask, positions)
        other.stack = self._select_stack(positions)
        other.cluster_phase = self.cluster_phase
        other.copies, other.bulk = list(self.copies), list(self.bulk)
        other.copy_groups = [list(group) for group in self.copy_groups]
        other.bulk_groups = [list(group) for group in self.bulk_groups]
        self.R = self._select(keep)
        self.stack = self._select_stack(keep)
        self.mask = _lanes_of(self.mask, keep)
        self.warps = self.warps[keep]
        self.lanes = 32 * len(self.warps)
        self._special = {}
        return other

    def _select(self, positions: np.ndarray) -> list[Any]:
        lanes = (positions[:, None] * 32 + np.arange(32)).ravel()
        return [x[lanes] if isinstance(x, np.ndarray) and x.ndim else x for x in self.R]

    def _select_stack(self, positions: np.ndarray) -> list[tuple[int, Any, list[tuple[int, Any]]]]:
        return [
            (
                block,
                _lanes_of(mask, positions),
                [(pc, _lanes_of(m, positions)) for pc, m in rest],
            )
            for block, mask, rest in self.stack
        ]

    def settle(self) -> None:
        """Finish the products whose registers are about to be copied."""
        if self.products:
            self.cta.machine.queue.finish(self.products)
            self.end_products(self.products)
            self.products, self.product_groups = [], []

    def end_products(self, products: Iterable[AsyncOp]) -> None:
        """Tell the race checker that products have read their operands."""
        race = self.cta.race
        if race is not None:
            for op in products:
                for copy in op.mark or ():
                    race.was_read(copy)

    def absorb(self, other: "Gang", live: Iterable[int]) -> None:
        """Take in the warps of another gang that is at the same block, unmasked like this one."""
        self.settle()
        other.settle()
        warps = np.concatenate([self.warps, other.warps])
        order = np.argsort(warps)
        lanes = (order[:, None] * 32 + np.arange(32)).ravel()
        registers: list[Any] = [None] * len(self.R)
        for index in live:
            a, b = self.R[index], other.R[index]
            if a is None or b is None:
                continue
            if not _is_array(a) and not _is_array(b) and a == b:
                registers[index] = a
            else:
                parts = [np.broadcast_to(a, self.lanes), np.broadcast_to(b, other.lanes)]
                registers[index] = np.concatenate(parts)[lanes]
        self.R = registers
        self.warps = warps[order]
        self.lanes = 32 * len(warps)
        self._special = {}
        self.copies += [op for op in other.copies if op not in self.copies]
        self.bulk += [op for op in other.bulk if op not in self.bulk]
        self.copy_groups = _zip_groups(self.copy_groups, other.copy_groups)
        self.bulk_groups = _zip_groups(self.bulk_groups, other.bulk_groups)
        other.done, other.ready = True, False

    def part_by(self, values: Any, pc: int) -> int | None:
        """Part the warps whose first lane's value differs from the first warp's; None if none."""
        per_warp = np.broadcast_to(values, self.lanes)[::32]
        differs = per_warp != per_warp[0]
        if not differs.any():
            return None
        if self.stack:
            raise Unmodelled(
                "a barrier number that differs between warps inside a divergent region"
            )
        other = self.part(np.flatnonzero(differs), pc)
        self.cta.machine.add(other)
        self.pc = pc
        return BLOCKED


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _lanes_of(mask: Any, positions: np.ndarray) -> Any:
    """The mask's lanes of some warps. A full mask becomes None nowhere: stacks need arrays."""
    if mask is None:
        return None
    return mask.reshape(-1, 32)[positions].ravel()


def _zip_groups(a: list[list[AsyncOp]], b: list[list[AsyncOp]]) -> list[list[AsyncOp]]:
    """Join two lists of groups so that the newest groups correspond."""
    size = max(len(a), len(b))
    a = [[]] * (size - len(a)) + a
    b = [[]] * (size - len(b)) + b
    return [x + [op for op in y if op not in x] for x, y in zip(a, b, strict=True)]
