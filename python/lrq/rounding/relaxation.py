"""Gradient descent on a relaxation whose codes are what counts.

Every weight is free to move by up to one step of the grid to either side of its source; its code is the nearest one.
The gradient is that of the objective with the codes in place of all weights but the one that it belongs to, whose own
part is that of its relaxed value: a straight-through estimate (Bengio, Léonard and Courville, 2013) without the pull
that makes weights swing between two codes. At rest each code is the best one for the others. All iterates are on the
grid, and the best of them is kept. Matrices of a batch are decided about on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.rounding.problem import Problem, Solution, product_dtype, squares

CHECK = 16
"""Iterations between two looks at whether all matrices have stopped."""
PATIENCE = 100
"""Iterations without a better iterate after which a matrix stops."""
LEAST = 1e-3
"""It stops, too, when its learning rate has fallen to this share of the first."""


@dataclass
class Progress:
    """How the matrices of a batch are doing, every field [B]."""

    rate: Tensor
    improved: Tensor
    waited: Tensor
    """Iterations since the last improvement."""


def _adaptive(progress: Progress) -> Tensor:
    return progress.rate * torch.where(progress.improved, 1.01, 0.95)


def _exponential(progress: Progress) -> Tensor:
    return progress.rate * 0.98


def _plateau(progress: Progress) -> Tensor:
    return progress.rate * torch.where((progress.waited > 0) & (progress.waited % 8 == 0), 0.5, 1.0)


SCHEDULES: dict[str, Callable[[Progress], Tensor]] = {
    "adaptive": _adaptive,
    "exponential": _exponential,
    "plateau": _plateau,
}


class Original:
    """Gradient descent, every weight in units of its own curvature."""

    def __init__(self, like: Tensor) -> None:
        pass

    def direction(self, gradient: Tensor, curvature: Tensor, iteration: int) -> Tensor:
        return gradient / curvature


class AdamW:
    """Adam; the decay towards the source weight is decoupled (Loshchilov and Hutter, 2019)."""

    FIRST, SECOND, DECAY, EPS = 0.9, 0.99, 0.01, 1e-30

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor, curvature: Tensor, iteration: int) -> Tensor:
        mean, deviation = self._moments(gradient, iteration)
        return mean / (deviation + self.EPS)

    def _moments(self, gradient: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        self.mean.lerp_(gradient, 1 - self.FIRST)
        self.square.mul_(self.SECOND).addcmul_(gradient, gradient, value=1 - self.SECOND)
        square = self.square / (1 - self.SECOND**iteration)
        return self.mean / (1 - self.FIRST**iteration), square.sqrt()


class RAdam(AdamW):
    """Adam whose first steps, of unknown variance, are rectified (Liu et al., 2020)."""

    def direction(self, gradient: Tensor, curvature: Tensor, iteration: int) -> Tensor:
        mean, deviation = self._moments(gradient, iteration)
        power = self.SECOND**iteration
        longest = 2 / (1 - self.SECOND) - 1
        length = longest - 2 * iteration * power / (1 - power)
        if length <= 5:
            # Of unknown variance: as gradient descent does it.
            return mean / curvature
        top = (length - 4) * (length - 2) * longest
        rectified = (top / ((longest - 4) * (longest - 2) * length)) ** 0.5
        return mean / (deviation + self.EPS) * rectified


class Relaxation:
    """A solver of :data:`lrq.rounding.solve.SOLVERS` made of a rule for directions."""

    def __init__(self, rule: type[Original] | type[AdamW]) -> None:
        self.rule = rule

    def __call__(self, problem: Problem, rounding: Rounding) -> Solution:
        run = _Run(problem, rounding, self.rule)
        for iteration in range(1, rounding.num_iter + 1):
            run.advance(iteration)
            if iteration % CHECK == 0 and bool(run.stopped.all()):
                break
        waiting = run.progress.waited >= PATIENCE
        reasons = zip(run.stopped.tolist(), waiting.tolist(), strict=True)
        return Solution(
            run.best,
            run.iterations.tolist(),
            [_reason(stopped, waited) for stopped, waited in reasons],
        )


def _reason(stopped: bool, waited: bool) -> str:
    if not stopped:
        return "num_iter reached"
    return f"no better in {PATIENCE} iterations" if waited else "learning rate vanished"


class _Run:
    """The iterates of a batch."""

    def __init__(self, problem: Problem, rounding: Rounding, rule: type[Original] | type[AdamW]) -> None:
        count, device = len(problem.weight), problem.weight.device
        self.dtype = product_dtype(device)
        self.problem, self.metric = problem, problem.metric.to(self.dtype)
        self.schedule, self.first_rate = SCHEDULES[rounding.lr_schedule], rounding.lr
        self.scale = problem.spread_scale()
        self.exact = torch.where(self.scale > 0, problem.weight / self.scale, 0.0)
        self.exact.clamp_(-problem.grid.largest, problem.grid.largest)
        self.gap = problem.grid.gap(self.exact)
        row, column = problem.metric.curvature()
        curvature = column[:, None] if row is None else row[:, :, None] * column[:, None]
        self.plain = problem.metric.plain_weight[:, None, None]
        self.unit, self.curvature = self.gap * self.scale, curvature
        self.offset = torch.zeros_like(problem.weight)
        self.rule = rule(self.offset)
        self.best = problem.start
        self.least = torch.full((count,), torch.inf, device=device)
        flags = torch.zeros(count, dtype=torch.bool, device=device)
        self.stopped = flags
        self.iterations = flags.int()
        self.progress = Progress(torch.full((count,), rounding.lr, device=device), flags, flags.int())

    def advance(self, iteration: int) -> None:
        """Codes of the iterate, their objective and gradient, the next iterate."""
        problem, metric, progress = self.problem, self.metric, self.progress
        values = problem.grid.nearest(self.exact + self.offset * self.gap)
        error = (values * self.scale).sub_(problem.weight)
        projected = metric.project(error.to(self.dtype))
        objective = squares(projected) + metric.plain_weight * squares(error)
        progress.improved = (objective < self.least) & ~self.stopped
        better = progress.improved[:, None, None]
        self.best = torch.where(better, values.bfloat16(), self.best)
        self.least = torch.where(progress.improved, objective, self.least)
        progress.waited = torch.where(progress.improved, 0, progress.waited + 1)
        progress.rate = self.schedule(progress)
        self.iterations += ~self.stopped
        self.stopped = self.stopped | (progress.waited >= PATIENCE) | (progress.rate < LEAST * self.first_rate)
        relaxed = self.offset * self.unit
        slope = metric.gradient(projected).float() + self.curvature * (relaxed - error) + self.plain * relaxed
        # Where nothing counts, nothing moves.
        curvature = ((self.curvature + self.plain) * self.unit.square()).clamp_(min=torch.finfo(torch.float32).tiny)
        step = self.rule.direction(slope * self.unit, curvature, iteration)
        self.offset.sub_(step * progress.rate[:, None, None]).clamp_(-1.0, 1.0)
