"""One process of the fuzzer: draws cases until enough have run, shrinks and keeps what fails."""

import faulthandler
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

from .backends import Backend
from .generate import Kernel, cases
from .verdict import verify

BATCH = 100  # cases of one run of hypothesis, which ends at its first finding
MOST_FINDINGS = 3
CASE_SECONDS = 900  # compiling included, on a busy machine; then it hangs


class DeviceLost(BaseException):
    """A CUDA error that ends the context: nothing more can run in this process."""


@dataclass
class Tally:
    """What one process did."""

    passed: int = 0
    refused: Counter = field(default_factory=Counter)  # by argument
    findings: list[dict[str, str]] = field(default_factory=list)
    kernels: int = 0

    @property
    def cases(self) -> int:
        return self.passed + sum(self.refused.values()) + len(self.findings)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Search:
    """Runs cases of one pool of kernels on one back end. `log` always names the present case."""

    backend: Backend
    pool: tuple[Kernel, ...]
    log: Path
    tally: Tally = field(default_factory=Tally)
    failed: tuple[Any, str] | None = None  # the last failure of this batch: at its end, minimal

    def run(self, wanted: int, seed: int, seconds: float) -> Tally:
        """At least `wanted` cases, unless the time or the number of findings ends it."""
        end, batch = time.monotonic() + seconds, 0
        while self.tally.cases < wanted and time.monotonic() < end:
            size = min(BATCH, wanted - self.tally.cases)
            before = self.tally.cases
            self.run_batch(size, seed * 1000 + batch, end)
            batch += 1
            if len(self.tally.findings) >= MOST_FINDINGS or self.tally.cases == before:
                break
        self.tally.kernels = self.backend.num_kernels()
        return self.tally

    def run_batch(self, size: int, seed: int, end: float) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=size,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @hypothesis.given(cases(self.pool, self.backend.limits))
        def property_of_all_cases(value: Any) -> None:
            if self.failed is None and time.monotonic() > end:
                return
            self.run_case(value)

        self.failed = None
        try:
            property_of_all_cases()
        except DeviceLost:
            raise
        except Exception:
            assert self.failed is not None, traceback.format_exc()
        if self.failed is not None:
            value, error = self.failed
            self.tally.findings.append({"case": repr(value), "error": error, "seed": str(seed)})

    def run_case(self, value: Any) -> None:
        """Raise what is wrong with the answer to one case."""
        self.log.write_text(repr(value))
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        shrinking = self.failed is not None
        try:
            with self.backend.running(value):
                verify(self.backend.package, value, self.backend.device, self.backend.twice)
        except NotImplementedError as refusal:
            if not shrinking:
                self.tally.refused[str(refusal).split("=")[0]] += 1
            return
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.failed = (value, text + "\n" + traceback.format_exc(limit=-4))
            if "CUDA error" in text:
                raise DeviceLost(text) from error
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        if not shrinking:
            self.tally.passed += 1
