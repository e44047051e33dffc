"""Matrices to be rounded together, and what a solver made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrq.formats.grid import Grid
from lrq.rounding.ladder import Ladder
from lrq.rounding.metric import Metric, sum_of_squares

CHUNK = 1 << 22
"""Weights whose error is in memory at a time."""


@dataclass(frozen=True)
class Problem:
    """Choose grid values q [B,N,K] so that ``metric(q·scale − weight)`` is small, for each of B matrices."""

    weight: Tensor
    """float32 [B,N,K]."""
    scale: Tensor
    """float32 [B,ceil(N/rows),ceil(K/columns)], not negative; where it is 0 the value stays 0."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    start: Tensor
    """bfloat16 [B,N,K], which holds every grid value: the nearest ones."""
    grid: Grid
    metric: Metric
    seed: int
    unit: Tensor
    """What stored scales are multiplied by to be :attr:`scale`: powers of two, float32 [B,1,1]."""
    ladder: Ladder | None = None
    """What scales could be as well; None: they are what they are."""

    def spread_scale(self, rows: slice = slice(None)) -> Tensor:
        """The scale of every weight of some rows; broadcasts to [B,rows,K]."""
        count, columns = self.weight.shape[1:]
        index = torch.arange(count, device=self.scale.device)[rows] // self.block[0]
        scale = self.scale[:, index]
        return scale if scale.shape[2] == 1 else scale.repeat_interleave(self.block[1], 2)[..., :columns]

    def parts(self) -> Iterator[slice]:
        """Some rows after the other, of :data:`CHUNK` weights."""
        count, rows, columns = self.weight.shape
        step = max(1, CHUNK // (count * columns))
        yield from (slice(first, first + step) for first in range(0, rows, step))

    def errors(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """E = q·scale − W by rows, a part at a time: whole, it would take as much memory as the weight."""
        for part in self.parts():
            yield part, (values[:, part].float() * self.spread_scale(part)).sub_(self.weight[:, part])

    def error(self, values: Tensor) -> Tensor:
        """E = q·scale − W, float32 [B,N,K]."""
        return torch.cat([error for _, error in self.errors(values)], 1)

    def projected(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``U'EV``, from products of a dtype; None: that of the weights."""
        metric = self.metric if dtype is None else self.metric.to(dtype)
        right = metric.right
        inner = right.new_empty(*self.weight.shape[:2], right.shape[2])
        for part, error in self.errors(values):
            inner[:, part] = error.to(right.dtype) @ right
        return inner if metric.left is None else metric.left.mT @ inner

    def plain(self, values: Tensor) -> Tensor:
        """``|E|^2``, float64 [B]."""
        total = self.weight.new_zeros(len(self.weight), dtype=torch.float64)
        for _, error in self.errors(values):
            total += sum_of_squares(error)
        return total

    def objective(self, values: Tensor, plain: Tensor | None = None) -> Tensor:
        """``|U'EV|^2 + λ|E|^2``, float64 [B]; ``plain`` is ``|E|^2`` if that is known."""
        plain = self.plain(values) if plain is None else plain
        projected = self.projected(values, product_dtype(self.weight.device))
        return sum_of_squares(projected) + self.metric.plain_weight * plain

    def restarted(self) -> Problem:
        """The same with the codes nearest under its scales for a start."""
        start = torch.empty_like(self.start)
        for part in self.parts():
            scale = self.spread_scale(part)
            quotient = torch.where(scale > 0, self.weight[:, part] / scale, 0.0)
            start[:, part] = self.grid.nearest(quotient).bfloat16()
        return replace(self, start=start)

    def select(self, index: Tensor) -> Problem:
        """Some matrices of the batch."""
        parts = {name: getattr(self, name)[index] for name in ("weight", "scale", "start", "unit")}
        ladder = None if self.ladder is None else self.ladder.select(index)
        return replace(self, **parts, metric=self.metric.select(index), ladder=ladder)


@dataclass(frozen=True)
class Solution:
    """Grid values of every matrix and how they were found."""

    values: Tensor
    """bfloat16 [B,N,K], on the grid."""
    iterations: list[int]
    stopped: list[str]
    """Why the solver stopped."""
    scale: Tensor | None = None
    """Of these values, as :attr:`Problem.scale`, where the solver chose them; None: the problem's."""


def product_dtype(device: torch.device) -> torch.dtype:
    """Of matrix products in a solver's loop: bfloat16, summed in float32, where that is the fast one."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def squares(x: Tensor) -> Tensor:
    """Sum of the squares of every matrix of x, float32 [B], in one pass."""
    return torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32).square()
