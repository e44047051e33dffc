"""Choosing the codes: one table of solvers, the same for every format."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import Format, Tensors
from lrq.rounding.block_scales import weighted_scales
from lrq.rounding.coordinate_descent import coordinate_descent
from lrq.rounding.discrete import discrete
from lrq.rounding.gptq import gptq
from lrq.rounding.ladder import Ladder
from lrq.rounding.metric import Metric, plain_metric, weight_metric
from lrq.rounding.moments import Moments, falling_order, moment_metric, sequential_metric
from lrq.rounding.problem import Problem, Solution
from lrq.rounding.relaxation import AdamW, Original, RAdam, Relaxation
from lrq.rounding.scales import Solve, refine_scales

SOLVERS: dict[str, Solve] = {
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
    plain_weight: float
    """λ, as raised for the limit of |E|."""


def solver_of(rounding: Rounding, measured: bool) -> str:
    """Key of :data:`SOLVERS`; ``measured`` says whether second moments across inputs are known."""
    return rounding.optimizer or ("gptq" if measured else "discrete")


def layer_seed(seed: int, name: str) -> int:
    """Seed of a layer: bytes do not depend on the order in which layers are converted."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def quantize_layer(
    fmt: Format,
    w: Tensor,
    rounding: Rounding,
    seed: int,
    moments: Moments | None = None,
    matrix_scale: Tensor | None = None,
) -> tuple[Tensors, list[Outcome]]:
    """Stored tensors of a weight [N,K] or [E,N,K], and one outcome per matrix (none for simple rounding).

    ``moments`` are those of the layer's inputs, where they are known; ``matrix_scale`` is the scale of the whole matrix
    where ``w`` is only some of its rows, for simple rounding.
    """
    w = w.float() if w.dtype == torch.float64 else w
    tensors = fmt.quantize(w, rounding.coherence if rounding.scale_search else None, matrix_scale)
    chooses = moments is not None and fmt.has_scale_search and rounding.scale_search
    if rounding.simple and not chooses:
        return tensors, []
    shape = tuple(w.shape)
    problem = problem_of(fmt, w, tensors, rounding, seed, moments)
    if rounding.simple:
        solution, outcomes = Solution(problem.start, [], []), list[Outcome]()
    else:
        solution, outcomes = learn(problem, rounding)
    values = solution.values
    if problem.ladder is not None:
        codes = problem.ladder.index(problem.scale if solution.scale is None else solution.scale)
        tensors = fmt.with_scale_codes(tensors, codes.view(*shape[:-1], -1))
    elif rounding.scale_rounds and fmt.has_scale_search and moments is None:
        tensors, values, outcomes = _with_scales(fmt, tensors, problem, values, outcomes, rounding)
    return fmt.with_codes(tensors, values.view(shape).float()), outcomes


def _with_scales(
    fmt: Format, tensors: Tensors, problem: Problem, values: Tensor, outcomes: list[Outcome], rounding: Rounding
) -> tuple[Tensors, Tensor, list[Outcome]]:
    """Scales and codes in turn, by the λ that keeps |E| within its limit."""
    plain_weight = problem.metric.plain_weight.new_tensor([one.plain_weight for one in outcomes])
    held = replace(problem, metric=replace(problem.metric, plain_weight=plain_weight))
    most = FROBENIUS_LIMIT**2 * problem.plain(problem.start)
    solve = SOLVERS[solver_of(rounding, measured=False)]
    tensors, found, values = refine_scales(
        fmt, tensors, held, values, rounding, solve, most, problem.metric.plain_weight
    )
    objective = replace(found, metric=problem.metric).objective(values).tolist()
    return tensors, values, [replace(one, objective_after=f) for one, f in zip(outcomes, objective, strict=True)]


def quantize_layers(
    fmt: Format, weights: Sequence[Tensor], rounding: Rounding, seed: int
) -> list[tuple[Tensors, list[Outcome]]]:
    """The same for weights [N,K] of one shape and dtype, rounded together: many small layers keep a GPU busy."""
    tensors, outcomes = quantize_layer(fmt, torch.stack(list(weights)), rounding, seed)
    each = [{suffix: stored[i] for suffix, stored in tensors.items()} for i in range(len(weights))]
    return [(one, outcomes[i : i + 1]) for i, one in enumerate(each)]


def problem_of(
    fmt: Format, w: Tensor, tensors: Tensors, rounding: Rounding, seed: int, moments: Moments | None = None
) -> Problem:
    """The problem of a weight [N,K] or [E,N,K] whose scales are stored already, in units of a power of two.

    With moments of the inputs the metric is theirs, and block scales that may be searched are the best ones under it.
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
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    if moments is None:
        metric = weight_metric(prepared, rounding, fmt)
        return Problem(prepared, compact, block, start, fmt.grid, metric, seed, unit)
    searches = fmt.has_scale_search and rounding.scale_search
    metric = _measured_metric(moments, len(prepared), block[1] if searches and fmt.has_fine_scales else 1, rounding)
    problem = Problem(prepared, compact, block, start, fmt.grid, metric, seed, unit)
    if not searches:
        return problem
    rungs = fmt.scales_of(torch.arange(fmt.last_scale + 1, device=w.device)[None], tensors).flatten(0, -2)
    ladder = Ladder(_times_power(rungs.expand(len(prepared), -1), exponent[:, 0]), fmt.scale_reach, fmt.has_fine_scales)
    problem = replace(problem, ladder=ladder)
    return replace(problem, scale=weighted_scales(problem, moments.weights())).restarted()


def _measured_metric(moments: Moments, count: int, block: int, rounding: Rounding) -> Metric:
    """The metric of statistics that the solver can use, for ``count`` matrices; ``block`` columns stay together.

    Simple rounding has no use for one.
    """
    if rounding.simple:
        return plain_metric(count, moments.weights())
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
    solution, plain_weight = solve(problem, rounding), problem.metric.plain_weight
    if problem.metric.limits_plain:
        solution, plain_weight = _within_limit(problem, rounding, solve, solution)
    scale = problem.scale if solution.scale is None else solution.scale
    before = problem.objective(problem.start)
    after = replace(problem, scale=scale).objective(solution.values)
    # Raising λ, or float32 in the last bits of a perfect fit, may lose against the start.
    lost = after > before
    values = torch.where(lost[:, None, None], problem.start, solution.values)
    scale = torch.where(lost[:, None, None], problem.scale, scale)
    least = torch.minimum(before, after).tolist()
    stopped = ["nearest is best" if i else why for i, why in zip(lost.tolist(), solution.stopped, strict=True)]
    outcomes = list(map(Outcome, solution.iterations, stopped, before.tolist(), least, plain_weight.tolist()))
    return Solution(values, solution.iterations, stopped, scale), outcomes


def _within_limit(problem: Problem, rounding: Rounding, solve: Solve, solution: Solution) -> tuple[Solution, Tensor]:
    """The solution, found again with a larger λ where |E| is too large, and λ [B]."""
    values, iterations, stopped = solution.values, list(solution.iterations), list(solution.stopped)
    plain_weight = problem.metric.plain_weight.clone()
    plain_before = problem.plain(problem.start)
    while True:
        over = (problem.plain(values) > FROBENIUS_LIMIT**2 * plain_before).nonzero()[:, 0]
        if not len(over):
            return Solution(values, iterations, stopped), plain_weight
        plain_weight[over] = 2 * plain_weight[over].clamp(min=0.05)
        metric = replace(problem.metric, plain_weight=plain_weight)
        again = solve(replace(problem, metric=metric).select(over), rounding)
        values = values.index_copy(0, over, again.values)
        for position, i in enumerate(over.tolist()):
            iterations[i], stopped[i] = again.iterations[position], again.stopped[position]
