"""Cyclic coordinate descent on the grid.

With every other weight of its row held, the objective is a parabola in one weight, so its best grid value is the
nearest one to the parabola's minimum: no learning rate, no relaxation, and the objective never rises. All rows move
together (with U = I they are independent); a sweep visits all columns, in blocks whose order the seed shuffles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.rounding.problem import Problem, Solution

BLOCK = 128
"""Columns between two updates of ``U'EV``."""
GAIN = 1e-4
"""A weight moves if that brings it nearer to its minimum by this share of the way: float32 noise moves nothing."""


def coordinate_descent(problem: Problem, rounding: Rounding) -> Solution:
    """Sweep until no weight can gain by moving alone, at most ``num_iter`` times; one matrix after the other."""
    count = len(problem.weight)
    each = [_descend(problem.select(torch.tensor([i])), rounding.num_iter) for i in range(count)]
    values, iterations, stopped = zip(*each, strict=True)
    return Solution(torch.cat(values), list(iterations), list(stopped))


def _descend(problem: Problem, num_iter: int) -> tuple[Tensor, int, str]:
    values = problem.start.float()
    scale = problem.spread_scale().expand(values.shape)
    generator = torch.Generator().manual_seed(problem.seed)
    starts = range(0, values.shape[2], BLOCK)
    for sweep in range(1, num_iter + 1):
        # Afresh in every sweep, so that float32 updates can't drift.
        projected = problem.projected(values)
        moved = False
        for position in torch.randperm(len(starts), generator=generator).tolist():
            part = slice(starts[position], starts[position] + BLOCK)
            block = _Block(problem, values[0, :, part], scale[0, :, part], part, projected[0])
            change = block.descend()
            if change is not None:
                moved = True
                values[0, :, part] = block.values.mT
                projected += problem.metric.project_block(change.mT[None], part)
        if not moved:
            return values.bfloat16(), sweep, "converged"
    return values.bfloat16(), num_iter, "num_iter reached"


class _Block:
    """One block of columns, transposed so that a column is contiguous."""

    def __init__(self, problem: Problem, values: Tensor, scale: Tensor, part: slice, projected: Tensor) -> None:
        metric = problem.metric
        self.nearest, self.plain = problem.grid.nearest, metric.plain_weight
        self.values, self.scale = values.mT.contiguous(), scale.mT.contiguous()
        self.weight = problem.weight[0, :, part].mT.contiguous()
        self.error = self.values * self.scale - self.weight
        directions = metric.right[0, part]
        self.gram = directions @ directions.mT
        self.curvature = self.gram.diagonal()[:, None] + self.plain
        outer = projected if metric.left is None else metric.left[0] @ projected
        self.gradient = directions @ outer.mT

    def _wanted(self, columns: int | slice) -> tuple[Tensor, Tensor]:
        """The best grid values of some columns, each weight alone, and which of them gain by moving there."""
        scale, error, values = self.scale[columns], self.error[columns], self.values[columns]
        slope = self.gradient[columns] + self.plain * error
        minimum = (self.weight[columns] + error - slope / self.curvature[columns]) / scale
        best = self.nearest(minimum)
        gain = (minimum - values).abs() - (minimum - best).abs()
        return best, (scale > 0) & (gain > GAIN * (best - values).abs())

    def descend(self) -> Tensor | None:
        """Visit the columns that gain; returns the change of the error [columns, N], None if there is none."""
        movers = self._wanted(slice(None))[1].any(1).nonzero()[:, 0].tolist()
        if not movers:
            return None
        before = self.error.clone()
        for i in movers:
            best, gains = self._wanted(i)
            value = torch.where(gains, best, self.values[i])
            change = (value - self.values[i]) * self.scale[i]
            self.values[i] = value
            self.error[i] += change
            # For U other than I this takes UU' for its upper bound I within the block: still a descent, only cautious.
            self.gradient[i + 1 :].addr_(self.gram[i + 1 :, i], change)
        return self.error - before
