"""Who runs next. Schedule 0 runs each gang until it waits; others interleave by a seeded draw."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Scheduler:
    """All choices of a run. The same seed makes the same choices."""

    seed: int = 0
    draw: random.Random = field(init=False)
    ranks: dict[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    @property
    def adversarial(self) -> bool:
        return self.seed != 0

    @property
    def starves(self) -> bool:
        """One schedule in four lets others, and what is in flight, go first as long as they can."""
        return self.seed % 4 == 3

    def choose(self, items: Sequence[T]) -> T:
        """The first item in schedule 0, any in others."""
        return items[0] if self.seed == 0 else items[self.draw.randrange(len(items))]

    def next_gang(self, ready: Sequence[Any]) -> Any:
        """Who runs; where warps starve, they run only if no other can."""
        if not self.starves or self.draw.random() < 0.02:
            return self.choose(ready)

        def rank(gang: Any) -> float:
            name = gang.cta.ctaid, int(gang.warps[0])
            return self.ranks.setdefault(name, self.draw.random())

        return min(ready, key=rank)

    def pauses(self) -> bool:
        """Whether a gang lets others run that it has just told something."""
        return self.seed != 0 and self.draw.random() < 0.5

    def quantum(self) -> int:
        """Basic blocks that a gang may run before another is considered."""
        return 20_000 if self.seed == 0 else self.draw.choice((1, 2, 4, 8, 32, 128, 1024))

    def lets_async_run(self) -> bool:
        """Whether an operation in flight finishes now although gangs can run."""
        return self.seed != 0 and self.draw.random() < (0.9 if self.starves else 0.3)

    def splits(self, warps: int) -> list[int] | None:
        """Warps (by position) to part from a gang at a point of waiting, or None."""
        if self.seed == 0 or warps == 1 or self.draw.random() > 0.15:
            return None
        part = [index for index in range(warps) if self.draw.random() < 0.5]
        return part if 0 < len(part) < warps else None
