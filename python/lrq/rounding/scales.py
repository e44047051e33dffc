"""Block scales again for the chosen codes, and codes again, in turn.

With the grid values q of a block held, f is a parabola in its scale: a change by d changes it by ``2d·s + d²·h``,
``s = <G,q>`` with half the gradient G of f, and ``h = q'VV'q·diag(UU') + λ|q|²`` of the block. As in
:mod:`~lrq.rounding.discrete`, a random share of the blocks that gain move their scale to the neighbour that the format
can store; a step that does not lower f is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq.config import Rounding
from lrq.formats import Format, Tensors
from lrq.rounding.problem import Problem, Solution

STEPS = 24
"""Steps of a round."""
SHARE, GROWTH, DECAY = 0.5, 1.25, 0.5
RELATIVE_GAIN = 1e-3
"""Another round follows one that lowered f by more than this share."""

Solve = Callable[[Problem, Rounding], Solution]


def refine_scales(
    fmt: Format,
    tensors: Tensors,
    problem: Problem,
    values: Tensor,
    rounding: Rounding,
    solve: Solve,
    most: Tensor,
    asked: Tensor,
) -> tuple[Tensors, Problem, Tensor]:
    """At most ``rounding.scale_rounds`` rounds while f falls; the stored scales, the problem with them, and the values.

    ``tensors`` are those of the problem's weights, [N,K] or [B,N,K]; |E|² does not exceed ``most``, float64 [B]. By
    ``asked``, the λ [B] before it was raised for the limit of |E|, f does not rise either.
    """
    shape = (*tensors["weight"].shape[:-2], *problem.weight.shape[1:])
    codes = fmt.scale_codes(tensors, shape).view(problem.scale.shape)
    raised = problem.metric.plain_weight - asked
    plain = problem.plain(values)
    before = problem.objective(values, plain)
    stated = before - raised * plain
    for number in range(rounding.scale_rounds):
        search = _Search(fmt, tensors, problem, values, codes, number)
        for _ in range(STEPS):
            search.advance()
        moved = replace(problem, scale=search.scale, start=values)
        found = solve(moved, rounding).values
        plain = moved.plain(found)
        after = moved.objective(found, plain)
        # Of a matrix that lost, all is as it was.
        better = (after < before) & (plain <= most) & (after - raised * plain <= stated)
        kept = better[:, None, None]
        codes = torch.where(kept, search.codes, codes)
        values = torch.where(kept, found, values)
        problem = replace(problem, scale=torch.where(kept, search.scale, problem.scale))
        gained = better & (after < before * (1 - RELATIVE_GAIN))
        before = torch.where(better, after, before)
        stated = torch.where(better, after - raised * plain, stated)
        if not bool(gained.any()):
            break
    return fmt.with_scale_codes(tensors, codes.view(*shape[:-2], *codes.shape[1:])), problem, values


class _Search:
    """Scales of a batch that move while the grid values stay."""

    def __init__(
        self, fmt: Format, tensors: Tensors, problem: Problem, values: Tensor, codes: Tensor, number: int
    ) -> None:
        self.fmt, self.tensors, self.problem, self.values = fmt, tensors, problem, values
        self.codes, self.scale = codes, problem.scale
        self.width, self.blocks = problem.block[1], problem.scale.shape[2]
        self.stiffness = self._stiffness()
        self.objective = problem.objective(values)
        self.share = torch.full_like(self.objective, SHARE)
        self.random = torch.Generator(problem.weight.device).manual_seed(problem.seed % (1 << 62) + number)

    def advance(self) -> None:
        """One step, decided on the device."""
        problem = replace(self.problem, scale=self.scale)
        slope = self._slope(problem)
        to = (self.codes - slope.sign().int()).clamp(1, self.fmt.last_scale)
        scale = self.fmt.scales_of(to.view(*self.tensors["weight"].shape[:-2], *to.shape[1:]), self.tensors)
        scale = scale.view(to.shape) * problem.unit
        change = scale - self.scale
        gains = (2 * change * slope + change.square() * self.stiffness < 0) & (self.codes > 0)
        # The same for every matrix of a batch: what becomes of one does not hang on the others.
        lot = torch.rand(to.shape[1:], generator=self.random, device=to.device)
        moves = gains & (lot < self.share[:, None, None])
        scale, to = torch.where(moves, scale, self.scale), torch.where(moves, to, self.codes)
        objective = replace(problem, scale=scale).objective(self.values)
        better = objective < self.objective
        kept = better[:, None, None]
        self.scale, self.codes = torch.where(kept, scale, self.scale), torch.where(kept, to, self.codes)
        self.objective = torch.where(better, objective, self.objective)
        self.share = torch.where(better, (self.share * GROWTH).clamp(max=1.0), self.share * DECAY)

    def _in_blocks(self, x: Tensor) -> Tensor:
        """[B,rows,K] as [B,rows,blocks,width], filled up with zeros."""
        return pad(x, (0, self.blocks * self.width - x.shape[-1])).unflatten(-1, (self.blocks, self.width))

    def _stiffness(self) -> Tensor:
        """h of every block, float32 [B,N,blocks]."""
        metric = self.problem.metric
        right = self._in_blocks(metric.right.mT).permute(0, 2, 3, 1)
        gram = right @ right.mT
        row, _ = metric.curvature()
        stiffness = torch.empty_like(self.scale)
        for part in self.problem.parts():
            q = self._in_blocks(self.values[:, part].float())
            quadratic = ((q.transpose(1, 2) @ gram).transpose(1, 2) * q).sum(-1)
            if row is not None:
                quadratic = quadratic * row[:, part, None]
            stiffness[:, part] = quadratic + metric.plain_weight[:, None, None] * q.square().sum(-1)
        return stiffness

    def _slope(self, problem: Problem) -> Tensor:
        """s of every block, float32 [B,N,blocks]."""
        metric, slope = problem.metric, torch.empty_like(self.scale)
        outer = problem.projected(self.values)
        outer = outer if metric.left is None else metric.left @ outer
        for part, error in problem.errors(self.values):
            gradient = outer[:, part] @ metric.right.mT + metric.plain_weight[:, None, None] * error
            slope[:, part] = self._in_blocks(gradient * self.values[:, part].float()).sum(-1)
        return slope
