"""Choosing the codes: one table of solvers, the same for every format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats
from lrq.config import Rounding
from lrq.formats import Format, Tensors
from lrq.rounding.block_scales import Ladder, weighted_scales
from lrq.rounding.coordinate_descent import coordinate_descent
from lrq.rounding.discrete import discrete
from lrq.rounding.gptq import gptq
from lrq.rounding.metric import Metric, weight_metric
from lrq.rounding.moments import Moments, falling_order, moment_metric, sequential_metric
from lrq.rounding.problem import Problem, Solution, relative_error
from lrq.rounding.relaxation import AdamW, Original, RAdam, Relaxation

SOLVERS: dict[str, Callable[[Problem, Rounding], Solution]] = {
    "discrete": discrete,
    "coordinate_descent": coordinate_descent,
    "original": Relaxation(Original),
    "adamw": Relaxation(AdamW),
    "radam": Relaxation(RAdam),
    "gptq": gptq,
}

FROBENIUS_LIMIT = 1.05
"""|E| may be this many times that of round-to-nearest with the same scales; λ is raised until it holds.
Not so under statistics (:attr:`lrq.rounding.metric.Metric.limits_plain`)."""


@dataclass(frozen=True)
class Outcome:
    """What learned rounding did to one matrix."""

    iterations: int
    stopped: str
    objective_before: float
    """In units of the power of two above the largest weight."""
    objective_after: float


def solver_of(rounding: Rounding, measured: bool) -> str:
    """Key of :data:`SOLVERS`; ``measured`` says whether second moments across inputs are known."""
    return rounding.optimizer or ("gptq" if measured else "discrete")


def layer_seed(seed: int, name: str) -> int:
    """Seed of a layer: bytes do not depend on the order in which layers are converted."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def quantize_layer(
    fmt: Format, w: Tensor, rounding: Rounding, seed: int, stats: InputStats | None = None
) -> tuple[Tensors, list[Outcome]]:
    """Stored tensors of a weight [N,K] or [E,N,K], and one outcome per matrix (none for simple rounding).

    ``stats`` are those of the layer's inputs, where they are known.
    """
    w = w.float() if w.dtype == torch.float64 else w
    tensors = fmt.quantize(w, rounding.coherence if rounding.scale_search else None)
    if rounding.simple:
        return tensors, []
    shape = tuple(w.shape)
    problem = problem_of(fmt, w, tensors, rounding, seed, stats)
    solution, outcomes = learn(problem, rounding)
    if problem.ladder is not None:
        index = problem.ladder.index(problem.scale if solution.scale is None else solution.scale)
        tensors = fmt.with_rungs(tensors, index.view(*shape[:-1], -1))
    return fmt.with_codes(tensors, solution.values.view(shape).float()), outcomes


def quantize_layers(
    fmt: Format, weights: Sequence[Tensor], rounding: Rounding, seed: int
) -> list[tuple[Tensors, list[Outcome]]]:
    """The same for weights [N,K] of one shape and dtype, rounded together: many small layers keep a GPU busy."""
    tensors, outcomes = quantize_layer(fmt, torch.stack(list(weights)), rounding, seed)
    each = [{suffix: stored[i] for suffix, stored in tensors.items()} for i in range(len(weights))]
    return [(one, outcomes[i : i + 1]) for i, one in enumerate(each)]


def problem_of(
    fmt: Format, w: Tensor, tensors: Tensors, rounding: Rounding, seed: int, stats: InputStats | None = None
) -> Problem:
    """The problem of a weight [N,K] or [E,N,K] whose scales are stored already, in units of a power of two.

    With statistics the metric is theirs, and block scales that may be searched are the best ones under it.
    """
    shape = tuple(w.shape)
    rows, columns = shape[-2:]
    prepared = fmt.prepare(w).view(-1, rows, columns)
    start, scale = fmt.expand(tensors, shape)
    block = fmt.block_shape(shape)
    scale = scale.expand(shape)
    compact = scale[..., :: block[0], :: block[1]].reshape(len(prepared), -(-rows // block[0]), -1)
    # Squares of very large or small weights leave float32; those of weights near 1 don't.
    low, high = prepared.flatten(1).aminmax(dim=1)
    exponent = -torch.frexp(torch.maximum(high, -low)).exponent[:, None, None]
    prepared, compact = _times_power(prepared, exponent), _times_power(compact, exponent)
    start = start.bfloat16().view(prepared.shape)
    if stats is None:
        return Problem(prepared, compact, block, start, fmt.grid, weight_metric(prepared, rounding), seed)
    moments = Moments(fmt, stats, w.device)
    searches = fmt.has_scale_search and rounding.scale_search
    metric = _measured_metric(moments, len(prepared), block[1] if searches else 1, rounding)
    problem = Problem(prepared, compact, block, start, fmt.grid, metric, seed)
    if not searches:
        return problem
    ladder = Ladder(_times_power(fmt.rungs(tensors).expand(len(prepared), -1), exponent[:, 0]), fmt.scale_reach)
    best = weighted_scales(prepared, compact, ladder, moments.second(), fmt.grid)
    return replace(problem, scale=best, ladder=ladder).restarted()


def _measured_metric(moments: Moments, count: int, block: int, rounding: Rounding) -> Metric:
    """The metric of statistics that the solver can use, for ``count`` matrices whose scales have ``block`` columns."""
    if solver_of(rounding, moments.correlated) != "gptq":
        return moment_metric(moments, count, rounding)
    h = moments.matrix()
    return sequential_metric(h, count, falling_order(h.diagonal(), block))


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    # In two steps: 2^exponent itself may leave float32.
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, half), exponent - half).contiguous()


def learn(problem: Problem, rounding: Rounding) -> tuple[Solution, list[Outcome]]:
    """A solution that is never worse than the start in the problem's metric.

    |E| is within :data:`FROBENIUS_LIMIT`, unless the metric is measured.
    """
    solve = SOLVERS[solver_of(rounding, problem.metric.order is not None)]
    solution = solve(problem, rounding)
    if problem.metric.limits_plain:
        solution = _within_limit(problem, rounding, solve, solution)
    scale = problem.scale if solution.scale is None else solution.scale
    before = problem.objective(problem.start)
    after = replace(problem, scale=scale).objective(solution.values)
    # Raising λ, or float32 in the last bits of a perfect fit, may lose against the start.
    lost = after > before
    values = torch.where(lost[:, None, None], problem.start, solution.values)
    scale = torch.where(lost[:, None, None], problem.scale, scale)
    least = torch.minimum(before, after).tolist()
    pairs = zip(lost.tolist(), solution.stopped, strict=True)
    stopped = ["nearest is best" if nearest else why for nearest, why in pairs]
    outcomes = list(map(Outcome, solution.iterations, stopped, before.tolist(), least))
    return Solution(values, solution.iterations, stopped, scale), outcomes


def _within_limit(
    problem: Problem, rounding: Rounding, solve: Callable[[Problem, Rounding], Solution], solution: Solution
) -> Solution:
    values, iterations, stopped = solution.values, list(solution.iterations), list(solution.stopped)
    plain_weight = problem.metric.plain_weight.clone()
    while True:
        over = (relative_error(problem, values) > FROBENIUS_LIMIT).nonzero()[:, 0]
        if not len(over):
            return Solution(values, iterations, stopped)
        plain_weight[over] = 2 * plain_weight[over].clamp(min=0.05)
        metric = replace(problem.metric, plain_weight=plain_weight)
        again = solve(replace(problem, metric=metric).select(over), rounding)
        values = values.index_copy(0, over, again.values)
        for position, i in enumerate(over.tolist()):
            iterations[i], stopped[i] = again.iterations[position], again.stopped[position]
