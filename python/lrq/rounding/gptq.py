"""Sequential rounding with error feedback under the second moments of the inputs: GPTQ.

Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers": column after column is rounded, and the columns still to come make up for its error as well as they can.
With H = RR', R upper triangular in the order of the columns, ``tr(EHE') = Σ_j R_jj² |q_j s_j − t_j|²`` where the target
``t_j = w_j − Σ_(i<j) E_i R_ij/R_jj`` hangs on columns that are rounded already: rounding each target to nearest is
GPTQ (Chen et al. 2025, "The geometry of LLM quantization: GPTQ as Babai's nearest plane algorithm", theorem 1), with no
inverse of H. Targets of a block of columns come from one matrix product (lazy updates, section 3.2 there).

Where a format lets a block of columns choose its scale, every candidate rounds the whole block, and the one with the
least sum above wins: the scale is the best one for the targets, not for the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.errors import InputError
from lrq.rounding.problem import Problem, Solution

OUTER = 128
"""Columns whose targets one matrix product brings up to date."""
INNER = 32
"""The same within those, where no block of columns shares a scale that is searched."""


def gptq(problem: Problem, rounding: Rounding) -> Solution:
    """Round every column once, in the metric's order.

    Raises:
        InputError: the metric is not that of statistics.
    """
    order = problem.metric.order
    if order is None:
        raise InputError("--optimizer gptq: needs statistics of the layer's inputs, --calib FILE")
    count, rows, columns = problem.weight.shape
    # All matrices have the same inputs, and rows don't know of each other.
    weight = problem.weight.flatten(0, 1)[:, order].mT.contiguous()
    run = _Run(problem.grid.on(weight.device), weight, problem.metric.right[0][order])
    scale = (
        _with_given_scales(run, problem, order) if problem.ladder is None else _with_best_scales(run, problem, order)
    )
    values = run.values[order.argsort()].mT.reshape(count, rows, columns)
    return Solution(values, [1] * count, ["all columns rounded"] * count, scale)


def _with_given_scales(run: _Run, problem: Problem, order: Tensor) -> Tensor:
    columns = len(order)
    each = problem.spread_scale().expand(problem.weight.shape).flatten(0, 1).mT
    for begin in range(0, columns, OUTER):
        part = slice(begin, min(begin + OUTER, columns))
        run.advance(part, [one[:, None] for one in each[order[part]].split(INNER)])
    return problem.scale


def _with_best_scales(run: _Run, problem: Problem, order: Tensor) -> Tensor:
    """The same with a choice of scales; returns those chosen, as the problem's."""
    ladder, block, columns = problem.ladder, problem.block[1], len(order)
    assert ladder is not None
    chosen = problem.scale.clone()
    places = order[::block] // block
    outer = max(1, OUTER // block)
    for begin in range(0, len(places), outer):
        where = places[begin : begin + outer]
        part = slice(begin * block, min((begin + outer) * block, columns))
        around = ladder.around(problem.scale[:, :, where]).flatten(1, 2).movedim(2, 0).contiguous()
        sizes = [min(block, columns - (begin + i) * block) for i in range(len(where))]
        each = [one.expand(size, -1, -1) for one, size in zip(around, sizes, strict=True)]
        picked = run.advance(part, each).view(len(where), *chosen.shape[:2])
        chosen[:, :, where] = picked.movedim(0, 2)
    return chosen


class _Run:
    """Columns [K,M] of all rows, in the order in which they are rounded."""

    def __init__(self, nearest: Callable[[Tensor], Tensor], weight: Tensor, factor: Tensor) -> None:
        self.nearest, self.weight = nearest, weight
        self.curvature = factor.diagonal().square()
        self.feedback = factor / factor.diagonal()
        self.values = torch.zeros_like(weight, dtype=torch.bfloat16)
        self.error = torch.zeros_like(weight)

    def advance(self, columns: slice, scales: list[Tensor]) -> Tensor:
        """Round some columns, which ``scales`` [columns,C,M] cut in parts; C are the candidates of a part.

        Returns the scale of each part's first column, [parts,M].
        """
        begin = columns.start
        target = self.weight[columns] - self.feedback[:begin, columns].mT @ self.error[:begin]
        chosen = []
        low = begin
        for scale in scales:
            part = slice(low, low + len(scale))
            near = self.feedback[begin:low, part].mT @ self.error[begin:low]
            chosen.append(self._round(part, target[low - begin : part.stop - begin] - near, scale))
            low = part.stop
        return torch.stack(chosen)

    def _round(self, part: slice, target: Tensor, scale: Tensor) -> Tensor:
        size, candidates, rows = scale.shape
        weight, feedback = self.weight[part], self.feedback[part, part]
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        values, stored, wanted, error = (torch.empty_like(scale, memory_format=torch.contiguous_format) for _ in "qswe")
        flat = error.view(size, -1)
        # On a GPU the launches of this loop are what takes time: whatever can be is done for all columns together.
        for i in range(size):
            torch.sub(target[i], (feedback[:i, i] @ flat[:i]).view(candidates, rows), out=wanted[i])
            values[i] = self.nearest(wanted[i] * inverse[i])
            torch.mul(values[i], scale[i], out=stored[i])
            torch.sub(stored[i], weight[i], out=error[i])
        if candidates == 1:
            self.values[part], self.error[part] = values[:, 0], error[:, 0]
            return scale[0, 0]
        missed = stored.sub_(wanted).square_().flatten(1)
        best = (self.curvature[part] @ missed).view(candidates, rows).argmin(0, keepdim=True)
        index = best.expand(size, 1, rows)
        self.values[part], self.error[part] = values.gather(1, index)[:, 0], error.gather(1, index)[:, 0]
        return scale[0].gather(0, best)[0]
