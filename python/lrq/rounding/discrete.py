"""Parallel discrete descent on the grid.

In every step a random share of the weights that gain by moving alone moves to its neighbour on the grid. If the
objective falls the step is kept and the share grows, else it is undone and the share halves. All of that is decided on
the device; the host only asks, every :data:`CHECK` steps, whether every matrix has come to rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lrq_kernels
from lrq.config import Rounding
from lrq.rounding.problem import Problem, Solution, product_dtype, squares

SHARE = 0.1
"""Of the weights that gain, what moves in the first step."""
GROWTH, DECAY = 1.25, 0.5
CHECK = 16
"""Steps between two looks at whether the objective still falls."""
RELATIVE_GAIN = 1e-3
"""A matrix is at rest if its objective fell by less than this share in :data:`CHECK` steps."""


def discrete(problem: Problem, rounding: Rounding) -> Solution:
    """Step until the objectives stand still, at most ``num_iter`` times."""
    state = _State(problem)
    for first in range(0, rounding.num_iter, CHECK):
        steps = range(first, min(first + CHECK, rounding.num_iter))
        for step in steps:
            state.advance(step)
        state.iterations += len(steps) * ~state.rested
        if len(steps) == CHECK and state.rests():
            break
    iterations = state.iterations.tolist()
    rested = state.rested.tolist()
    return Solution(state.values, iterations, ["converged" if at_rest else "num_iter reached" for at_rest in rested])


class _State:
    """Where every matrix of the batch stands."""

    def __init__(self, problem: Problem) -> None:
        count, device = len(problem.weight), problem.weight.device
        # The host is as slow as the device here: every operation of a step counts.
        # Products in bfloat16 with float32 sums lose nothing: the error of a step is found afresh from the codes.
        dtype = product_dtype(device)
        self.problem, self.metric = problem, problem.metric.to(dtype)
        self.row_curvature, self.column_curvature = problem.metric.curvature()
        self.values = problem.start
        self.projected = problem.projected(problem.start, dtype)
        plain = problem.plain(problem.start).float()
        self.objective = squares(self.projected) + problem.metric.plain_weight * plain
        self.checked = self.objective.clone()
        self.share = torch.full((count,), SHARE, device=device)
        self.rested = torch.zeros(count, dtype=torch.bool, device=device)
        self.iterations = torch.zeros(count, dtype=torch.int32, device=device)

    def advance(self, step: int) -> None:
        """One step; no word of it reaches the host."""
        problem, metric = self.problem, self.metric
        values, error, sums = lrq_kernels.rounding_step(
            problem.weight,
            self.values,
            problem.scale,
            *problem.block,
            metric.gradient(self.projected),
            self.row_curvature,
            self.column_curvature,
            metric.plain_weight,
            self.share,
            problem.seed,
            step,
            problem.grid.name.lower(),
        )
        projected = metric.project(error.to(metric.right.dtype))
        objective = squares(projected) + metric.plain_weight * sums[..., 0].sum(1)
        kept = objective < self.objective
        self.values = _chosen(kept, values, self.values)
        self.projected = torch.where(kept[:, None, None], projected, self.projected)
        self.objective = torch.where(kept, objective, self.objective)
        self.share = (self.share * torch.where(kept, GROWTH, DECAY)).clamp_(max=1.0)

    def rests(self) -> bool:
        """Whether no matrix is worth another step; waits for the device."""
        self.rested |= self.objective >= self.checked * (1 - RELATIVE_GAIN)
        # Nothing of them moves any more.
        self.share.masked_fill_(self.rested, 0.0)
        self.checked = self.objective
        return bool(self.rested.all())


def _chosen(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Matrices [B,N,K] of ``new`` or ``old``, bit for bit."""
    # What is chosen by row costs as much for an element of any size.
    element = torch.int64 if new[0].numel() % 4 == 0 else new.dtype
    chosen = torch.where(which[:, None], new.flatten(1).view(element), old.flatten(1).view(element))
    return chosen.view(new.dtype).view(new.shape)
