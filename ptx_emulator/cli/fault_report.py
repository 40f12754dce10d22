"""What became of faults: a line of JSON each, from as many processes as took part, and the report.

Each process also writes one line about the campaign, by which `merge` sees that all ran the same
kernel and drew the same faults.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..mutation import KINDS


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    line: int  # of the PTX, counted from 1
    text: str  # what stands there without the fault
    noticed: str  # "" if it was not
    schedule: int  # the first that noticed it, or -1
    idle: bool = False  # it is about an mbarrier that the kernel never uses

    def __str__(self) -> str:
        said = self.noticed or ("unused" if self.idle else "SURVIVED")
        return f"line {self.line} {self.kind}: {said} ({self.schedule})  {self.text}"


@dataclass(frozen=True)
class Head:
    """What the outcomes of one campaign have in common."""

    subject: str
    ptx_sha256: str
    schedules: int
    places: int
    drawn: int  # faults that were to be tried, by all processes together


def report(head: Head, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by kind, and every fault that was not noticed."""
    caught = [outcome for outcome in outcomes if outcome.noticed]
    idle = [outcome for outcome in outcomes if outcome.idle]
    kinds = {
        kind: {
            "faults": sum(o.kind == kind and not o.idle for o in outcomes),
            "noticed": dict(Counter(o.noticed for o in caught if o.kind == kind)),
        }
        for kind in KINDS
        if any(o.kind == kind for o in outcomes)
    }
    return {
        "ptx_sha256": head.ptx_sha256,
        "schedules": head.schedules,
        "places": head.places,
        "not_tried": head.drawn - len(outcomes),
        "faults": len(outcomes) - len(idle),
        "caught": len(caught),
        "by_schedule_0": sum(o.schedule == 0 for o in caught),
        "kinds": kinds,
        "survivors": [asdict(o) for o in outcomes if not o.noticed and not o.idle],
        "in_unused_barriers": [asdict(o) for o in idle],
    }


def summary(name: str, found: dict[str, Any]) -> str:
    """A report in one line."""
    share = found["caught"] / max(1, found["faults"])
    rest = f", {found['not_tried']} not tried" if found["not_tried"] else ""
    return (
        f"{name}: {found['caught']} of {found['faults']} noticed ({share:.1%}), "
        f"{found['by_schedule_0']} by schedule 0{rest}"
    )


class Lines:
    """A file that grows by a line for each outcome, so that who is stopped leaves what it knew."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.write_text("")

    def head(self, head: Head) -> None:
        self._write({"head": asdict(head)})

    def outcome(self, subject: str, number: int, outcome: Outcome) -> None:
        self._write({"subject": subject, "number": number, "outcome": asdict(outcome)})

    def _write(self, value: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(value) + "\n")


def merge(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The reports on all subjects that the files tell of.

    Raises:
        ValueError: processes ran different kernels or drew different faults.
    """
    heads: dict[str, Head] = {}
    outcomes: dict[str, dict[int, Outcome]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            value = json.loads(line)
            if "head" in value:
                head = Head(**value["head"])
                known = heads.setdefault(head.subject, head)
                if known != head:
                    raise ValueError(f"{path}: {head} is another campaign than {known}")
            else:
                found = outcomes.setdefault(value["subject"], {})
                found[value["number"]] = Outcome(**value["outcome"])
    return {
        name: report(head, [found for _, found in sorted(outcomes.get(name, {}).items())])
        for name, head in heads.items()
    }
