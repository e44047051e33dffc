"""Sequential rounding with error feedback under the second moments of the inputs: GPTQ.

Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers": column after column is rounded, and the columns still to come make up for its error as well as they can.
With H = RR', R upper triangular in the order of the columns, ``tr(EHE') = Σ_j R_jj² |q_j s_j − t_j|²`` where the target
``t_j = w_j − Σ_(i<j) E_i R_ij/R_jj`` hangs on columns that are rounded already: rounding each target to nearest is
GPTQ (Chen et al. 2025, "The geometry of LLM quantization: GPTQ as Babai's nearest plane algorithm", theorem 1), with no
inverse of H. Targets of a block of columns come from one matrix product (lazy updates, section 3.2 there).

Where a block of columns can choose among close scales, every candidate rounds the whole block, and the one with the
least sum above wins: the scale is the best one for the targets, not for the weights. For that the columns of a block
stay together. Powers of two are not worth that: their columns go in the order that is best for each.
"""

from __future__ import annotations

import threading
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
_CAPTURE = threading.Lock()
"""Before a capture torch waits for the whole device, which fails while another thread captures."""


def gptq(problem: Problem, rounding: Rounding) -> Solution:
    """Round every column once, in the metric's order.

    Raises:
        InputError: the metric is not that of statistics.
    """
    order = problem.metric.order
    if order is None:
        raise InputError("--optimizer gptq: needs statistics of the layer's inputs, --calib FILE")
    count = len(problem.weight)
    feedback = _Feedback(problem.grid.on(problem.weight.device), problem.metric.right[0][order])
    # One matrix at a time: products of other shapes have other bits, and a bank may come in parts.
    solved = [_round_matrix(problem.select(torch.tensor([i])), order, feedback) for i in range(count)]
    values, scales = (torch.cat(parts) for parts in zip(*solved, strict=True))
    return Solution(values, [1] * count, ["all columns rounded"] * count, scales)


def _round_matrix(problem: Problem, order: Tensor, feedback: _Feedback) -> tuple[Tensor, Tensor]:
    """Grid values [1,N,K] of a problem with one matrix, and their scales, as the problem's."""
    run = _Run(problem.weight[0][:, order].mT.contiguous(), feedback)
    chooses = problem.ladder is not None and problem.ladder.fine
    rounded = _with_best_scales if chooses else _with_given_scales
    scale = rounded(run, problem, order)
    return run.values[order.argsort()].mT[None].contiguous(), scale


def _with_given_scales(run: _Run, problem: Problem, order: Tensor) -> Tensor:
    each = problem.spread_scale().expand(problem.weight.shape)[0].mT
    for begin in range(0, len(order), OUTER):
        run.advance(begin, [one[:, None] for one in each[order[begin : begin + OUTER]].split(INNER)])
    return problem.scale


def _with_best_scales(run: _Run, problem: Problem, order: Tensor) -> Tensor:
    """The same with a choice of scales; returns those chosen, as the problem's."""
    ladder, block, columns = problem.ladder, problem.block[1], len(order)
    assert ladder is not None
    chosen = problem.scale.clone()
    places = order[::block] // block
    outer = max(1, OUTER // block)
    for first in range(0, len(places), outer):
        where = places[first : first + outer]
        around = ladder.around(problem.scale[:, :, where])[:, 0].movedim(2, 0)
        starts = range(first * block, columns, block)
        each = [one.expand(min(block, columns - at), -1, -1) for at, one in zip(starts, around, strict=False)]
        chosen[0][:, where] = run.advance(first * block, each).mT
    return chosen


class _Run:
    """Columns [K,M] of a matrix, in the order in which they are rounded."""

    def __init__(self, weight: Tensor, feedback: _Feedback) -> None:
        self.weight, self.feedback = weight, feedback
        self.values = torch.zeros_like(weight, dtype=torch.bfloat16)
        self.error = torch.zeros_like(weight)

    def advance(self, begin: int, scales: list[Tensor]) -> Tensor:
        """Round the columns from ``begin`` on; ``scales`` [columns,C,M] are the C candidates of parts of them.

        Returns the scale of each part's first column, [parts,M].
        """
        factor, chosen, low = self.feedback.factor, [], begin
        whole = slice(begin, begin + sum(map(len, scales)))
        target = self.weight[whole] - factor[:begin, whole].mT @ self.error[:begin]
        for scale in scales:
            part = slice(low, low + len(scale))
            near = factor[begin:low, part].mT @ self.error[begin:low]
            wanted = target[low - begin : part.stop - begin] - near
            self.values[part], self.error[part], best = self.feedback.round(part, wanted, self.weight[part], scale)
            chosen.append(best.clone())
            low = part.stop
        return torch.stack(chosen)


class _Feedback:
    """How the errors of columns move the targets of later ones, and the panels that round columns."""

    def __init__(self, nearest: Callable[[Tensor], Tensor], factor: Tensor) -> None:
        self.nearest = nearest
        self.curvature = factor.diagonal().square()
        self.factor = factor / factor.diagonal()
        self._panels: dict[torch.Size, _Panel] = {}

    def round(self, part: slice, target: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Grid values and errors [columns,M] of some columns with the best of the scales, and that, [M]."""
        if scale.shape not in self._panels:
            self._panels[scale.shape] = _Panel(self.nearest, scale.shape, scale.device)
        panel = self._panels[scale.shape]
        return panel(target, weight, scale, self.factor[part, part], self.curvature[part])


class _Panel:
    """Rounds a few columns one after the other, for every candidate of their scale, in memory of its own.

    On a GPU the kernels of this loop are so small that launching them takes longer: there it is a CUDA graph, with
    the same kernels.
    """

    def __init__(self, nearest: Callable[[Tensor], Tensor], shape: torch.Size, device: torch.device) -> None:
        size, _, rows = shape
        self.nearest, self.shape = nearest, shape
        self.target, self.weight, self.values, self.error = torch.zeros(4, size, rows, device=device)
        self.scale = torch.zeros(shape, device=device)
        self.factor, self.curvature = torch.zeros(size, size, device=device), torch.zeros(size, device=device)
        self.best = torch.zeros(rows, device=device)
        self._run = _replayed(self._round, device)

    def __call__(
        self, target: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, curvature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What it returns holds until the next call."""
        given = (target, weight, scale, factor, curvature)
        for own, one in zip((self.target, self.weight, self.scale, self.factor, self.curvature), given, strict=True):
            own.copy_(one)
        self._run()
        return self.values, self.error, self.best

    def _round(self) -> None:
        size, candidates, rows = self.shape
        scale, minus = self.scale, -self.weight
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        wanted = self.target[:, None].repeat(1, candidates, 1)
        error, values = torch.empty_like(wanted), []
        # Whatever can be is done for all columns together.
        for i in range(size):
            if i:
                wanted[i].view(-1).addmv_(error[:i].flatten(1).mT, self.factor[:i, i], alpha=-1)
            values.append(self.nearest(wanted[i] * inverse[i]))
            torch.addcmul(minus[i], values[i], scale[i], out=error[i])
        missed = (error - minus[:, None]).sub_(wanted).square_().flatten(1)
        least = (self.curvature @ missed).view(candidates, rows).argmin(0, keepdim=True)
        index = least.expand(size, 1, rows)
        self.values.copy_(torch.stack(values).gather(1, index)[:, 0])
        self.error.copy_(error.gather(1, index)[:, 0])
        self.best.copy_(scale[0].gather(0, least)[0])


def _replayed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``step``, which works on tensors that stay where they are; on a GPU captured once and launched as a whole."""
    if device.type != "cuda":
        return step
    with _CAPTURE, torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries take their workspaces in the first call, which a capture may not.
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy layers meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError:
            # What can't be captured is launched kernel by kernel: slower, with the same bits.
            return step
    return graph.replay
