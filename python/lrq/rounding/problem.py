"""One matrix to be rounded, and what a solver made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq.formats.grid import Grid
from lrq.rounding.metric import Metric, sum_of_squares

CHUNK = 1 << 22
"""Weights whose error is in memory at a time."""


@dataclass(frozen=True)
class Problem:
    """Choose grid values q [N,K] so that ``metric(q·scale − weight)`` is small."""

    weight: Tensor
    """float32 [N,K]."""
    scale: Tensor
    """float32, broadcasts to [N,K], not negative; where it is 0 the value stays 0."""
    start: Tensor
    """float32 [N,K]: the nearest grid values."""
    grid: Grid
    metric: Metric
    seed: int

    def error(self, values: Tensor) -> Tensor:
        """E = q·scale − W."""
        return (values * self.scale).sub_(self.weight)

    def errors(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """E by rows, a part at a time: whole, it would take as much memory as the weight."""
        scale = self.scale.expand(self.weight.shape)
        rows = max(1, CHUNK // self.weight.shape[1])
        for first in range(0, len(self.weight), rows):
            part = slice(first, first + rows)
            yield part, (values[part] * scale[part]).sub_(self.weight[part])

    def projected(self, values: Tensor) -> Tensor:
        """``U'EV``."""
        inner = self.weight.new_empty(len(self.weight), self.metric.right.shape[1])
        for part, error in self.errors(values):
            torch.matmul(error, self.metric.right, out=inner[part])
        return inner if self.metric.left is None else self.metric.left.mT @ inner

    def plain(self, values: Tensor) -> float:
        """``|E|^2``, summed in float64."""
        return sum(sum_of_squares(error) for _, error in self.errors(values))

    def objective(self, values: Tensor) -> float:
        """``|U'EV|^2 + λ|E|^2``, summed in float64."""
        return sum_of_squares(self.projected(values)) + self.metric.plain_weight * self.plain(values)


@dataclass(frozen=True)
class Solution:
    """Grid values and how they were found."""

    values: Tensor
    """float32 [N,K], on the grid."""
    iterations: int
    stopped: str
    """Why the solver stopped."""


def relative_error(problem: Problem, values: Tensor) -> float:
    """|E|/|E0|, E0 the error of round-to-nearest with the same scales; 1 if that is zero."""
    start = problem.plain(problem.start)
    return math.sqrt(problem.plain(values) / start) if start > 0 else 1.0
