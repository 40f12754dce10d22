"""Finds the table's fitted constants: one value each for all kernels and shapes of a card."""

from dataclasses import dataclass

import numpy as np

from .grid import Prediction, Problem, predict
from .problems import Kernel, Lowered, lowered
from .table import Machine

Point = tuple[Kernel, Problem, float, bool]  # measured TFLOP/s, and whether it is fitted


@dataclass(frozen=True)
class Row:
    """A point and what was predicted for it."""

    kernel: Kernel
    problem: Problem
    measured: float
    fitted: bool
    predicted: Prediction

    @property
    def error(self) -> float:
        """Of the predicted TFLOP/s, as a share of the measured."""
        return self.predicted.tflops / self.measured - 1


class Model:
    """Kernels lowered once, predicted with any constants."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.kernels: dict[Kernel, Lowered] = {}

    def lowered(self, kernel: Kernel) -> Lowered:
        if kernel not in self.kernels:
            self.kernels[kernel] = lowered(kernel, self.machine)
        return self.kernels[kernel]

    def rows(self, points: list[Point], machine: Machine | None = None) -> list[Row]:
        machine = machine or self.machine
        costs = {k: self.lowered(k).costs(machine) for k in dict.fromkeys(p[0] for p in points)}
        return [
            Row(kernel, problem, measured, fitted, predict(
                problem, self.lowered(kernel).runs, costs[kernel], machine
            ))
            for kernel, problem, measured, fitted in points
        ]  # fmt: skip


def loss(rows: list[Row]) -> float:
    """Mean of squared logarithms: of factors, up or down."""
    return float(np.mean([np.log1p(row.error) ** 2 for row in rows]))


def fit(model: Model, points: list[Point], ranges: dict[str, tuple[float, ...]]) -> Machine:
    """The best of a grid of values a constant, one constant after the other until none changes.

    Only points that are marked as fitted count.
    """
    chosen = [point for point in points if point[3]]
    machine = model.machine
    best = loss(model.rows(chosen, machine))
    changed = True
    while changed:
        changed = False
        for name, values in ranges.items():
            for value in values:
                if value == machine[name]:
                    continue
                trial = machine.with_values(**{name: value})
                found = loss(model.rows(chosen, trial))
                if found < best - 1e-6:
                    best, machine, changed = found, trial, True
    return machine


def summary(rows: list[Row]) -> dict[str, float]:
    """Median and largest error, of absolute values."""
    errors = np.abs([row.error for row in rows])
    return {"median": float(np.median(errors)), "worst": float(errors.max()), "points": len(rows)}
