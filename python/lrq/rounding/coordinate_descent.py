"""Cyclic coordinate descent on the grid.

With every other weight of its row held, the objective is a parabola in one weight, so its best grid value is the
nearest one to the parabola's minimum: no learning rate, no relaxation, and the objective never rises. All rows move
together (with U = I they are independent); a sweep visits all columns, in blocks whose order the seed shuffles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrq.rounding.metric import Metric
from lrq.rounding.problem import Problem, Solution

BLOCK = 128
"""Columns between two updates of ``U'EV``."""
STILL = 1e-5
"""A sweep that moves no more than this share of the weights has converged."""


def coordinate_descent(problem: Problem, num_iter: int) -> Solution:
    """Sweep until (almost) nothing moves, at most ``num_iter`` times."""
    values = problem.start.clone()
    columns = values.shape[1]
    scale = problem.scale.expand(values.shape)
    generator = torch.Generator().manual_seed(problem.seed)
    starts = range(0, columns, BLOCK)
    for sweep in range(1, num_iter + 1):
        # Afresh in every sweep, so that float32 updates can't drift.
        projected = problem.metric.project(problem.error(values))
        moved = torch.zeros((), dtype=torch.int64, device=values.device)
        for position in torch.randperm(len(starts), generator=generator).tolist():
            part = slice(starts[position], starts[position] + BLOCK)
            block = _Block(problem, values[:, part], scale[:, part], problem.metric, part, projected)
            change = block.descend()
            moved += torch.count_nonzero(change)
            values[:, part] = block.values.mT
            projected += problem.metric.project_block(change.mT, part)
        if moved.item() <= STILL * values.numel():
            return Solution(values, sweep, "converged")
    return Solution(values, num_iter, "num_iter reached")


class _Block:
    """One block of columns, transposed so that a column is contiguous."""

    def __init__(
        self, problem: Problem, values: Tensor, scale: Tensor, metric: Metric, part: slice, projected: Tensor
    ) -> None:
        self.grid, self.metric = problem.grid, metric
        self.values, self.scale = values.mT.contiguous(), scale.mT.contiguous()
        self.weight = problem.weight[:, part].mT.contiguous()
        self.error = self.values * self.scale - self.weight
        directions = metric.right[part]
        self.gram = directions @ directions.mT
        self.gradient = directions @ projected.mT if metric.left is None else directions @ (metric.left @ projected).mT

    def descend(self) -> Tensor:
        """Visit every column once; returns the change of the error [columns, N]."""
        before = self.error.clone()
        plain = self.metric.plain_weight
        curvature = (self.gram.diagonal() + plain).tolist()
        for i in range(len(self.values)):
            error, scale = self.error[i], self.scale[i]
            slope = self.gradient[i] + plain * error
            wanted = (self.weight[i] + error - slope / curvature[i]) / scale
            value = torch.where(scale > 0, self.grid.nearest(wanted), self.values[i])
            change = (value - self.values[i]) * scale
            self.values[i] = value
            error += change
            # For U other than I this takes UU' for its upper bound I within the block: still a descent, only cautious.
            self.gradient[i + 1 :].addr_(self.gram[i + 1 :, i], change)
        return self.error - before
