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
    metric = problem.metric
    if metric.order is None:
        raise InputError("--optimizer gptq: needs statistics of the layer's inputs, --calib FILE")
    count, rows, columns = problem.weight.shape
    # All matrices have the same inputs, and rows don't know of each other.
    factor = metric.right[0][metric.order]
    weight = problem.weight.flatten(0, 1)[:, metric.order].mT.contiguous()
    run = _Run(problem.grid.nearest, weight, factor)
    if problem.ladder is None:
        scale = problem.spread_scale().expand(problem.weight.shape).flatten(0, 1)[:, metric.order].mT.contiguous()
        for begin in range(0, columns, OUTER):
            run.advance(begin, min(begin + OUTER, columns), INNER, lambda part: scale[part, None])
        found = None
    else:
        found = _search(run, problem, metric.order)
    back = metric.order.argsort()
    values = run.values[back].mT.reshape(count, rows, columns).bfloat16()
    return Solution(values, [1] * count, ["all columns rounded"] * count, found)


def _search(run: _Run, problem: Problem, order: Tensor) -> Tensor:
    """The same with a choice of scales; returns those chosen, as the problem's."""
    ladder, block, columns = problem.ladder, problem.block[1], run.weight.shape[0]
    assert ladder is not None
    chosen = problem.scale.clone()
    places = order[::block] // block

    def scales(part: slice) -> Tensor:
        own = problem.scale.index_select(2, places[part.start // block][None])
        return ladder.around(own).flatten(1).expand(part.stop - part.start, -1, -1)

    outer = max(block, OUTER // block * block)
    for begin in range(0, columns, outer):
        end = min(begin + outer, columns)
        picked = torch.stack(run.advance(begin, end, block, scales))
        where = places[begin // block : -(-end // block)]
        chosen[:, :, where] = picked.view(len(picked), *chosen.shape[:2]).permute(1, 2, 0)
    return chosen


class _Run:
    """Columns [K,M] of all rows, in the order in which they are rounded."""

    def __init__(self, nearest: Callable[[Tensor], Tensor], weight: Tensor, factor: Tensor) -> None:
        self.nearest, self.weight = nearest, weight
        self.curvature = factor.diagonal().square()
        self.feedback = factor / factor.diagonal()
        self.values = torch.zeros_like(weight)
        self.error = torch.zeros_like(weight)

    def advance(self, begin: int, end: int, step: int, scales: Callable[[slice], Tensor]) -> list[Tensor]:
        """Round the columns from ``begin`` to ``end``, ``step`` of them at a time.

        ``scales`` gives the candidates of a part, [columns,C,M]. Returns the scales [M] of each part's first column.
        """
        target = self.weight[begin:end] - self.feedback[:begin, begin:end].mT @ self.error[:begin]
        chosen = []
        for low in range(begin, end, step):
            part = slice(low, min(low + step, end))
            near = self.feedback[begin:low, part].mT @ self.error[begin:low]
            chosen.append(self._round(part, target[low - begin : part.stop - begin] - near, scales(part)))
        return chosen

    def _round(self, part: slice, target: Tensor, scale: Tensor) -> Tensor:
        size, candidates, rows = scale.shape
        weight, feedback = self.weight[part], self.feedback[part, part]
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        error = target.new_empty(size, candidates * rows)
        values = target.new_empty(size, candidates, rows)
        loss = target.new_zeros(candidates, rows)
        for i in range(size):
            wanted = target[i] - (feedback[:i, i] @ error[:i]).view(candidates, rows)
            values[i] = self.nearest(wanted * inverse[i])
            stored = values[i] * scale[i]
            error[i] = (stored - weight[i]).flatten()
            loss += self.curvature[part.start + i] * (stored - wanted).square()
        error = error.view(size, candidates, rows)
        if candidates == 1:
            self.values[part], self.error[part] = values[:, 0], error[:, 0]
            return scale[0, 0]
        best = loss.argmin(0, keepdim=True)
        index = best.expand(size, 1, rows)
        self.values[part], self.error[part] = values.gather(1, index)[:, 0], error.gather(1, index)[:, 0]
        return scale[0].gather(0, best)[0]
