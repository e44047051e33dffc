"""One matrix to be rounded, and what a solver made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lrq.formats.grid import Grid
from lrq.rounding.metric import Metric, sum_of_squares


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
    start = sum_of_squares(problem.error(problem.start))
    return math.sqrt(sum_of_squares(problem.error(values)) / start) if start > 0 else 1.0
