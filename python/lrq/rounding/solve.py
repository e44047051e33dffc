"""Choosing the codes: one table of solvers, the same for every format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import Format, Tensors
from lrq.rounding.coordinate_descent import coordinate_descent
from lrq.rounding.metric import Metric, input_metric
from lrq.rounding.problem import Problem, Solution, relative_error

SOLVERS: dict[str, Callable[[Problem, int], Solution]] = {
    "coordinate_descent": coordinate_descent,
}

FROBENIUS_LIMIT = 1.05
"""|E| may be this many times that of round-to-nearest with the same scales; λ is raised until it holds."""


@dataclass(frozen=True)
class Outcome:
    """What learned rounding did to one matrix."""

    iterations: int
    stopped: str
    objective_before: float
    objective_after: float


def layer_seed(seed: int, name: str) -> int:
    """Seed of a layer: bytes do not depend on the order in which layers are converted."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def quantize_layer(fmt: Format, w: Tensor, rounding: Rounding, seed: int) -> tuple[Tensors, list[Outcome]]:
    """Stored tensors of a weight [N,K] or [E,N,K], and one outcome per matrix (none for simple rounding)."""
    w = w.float() if w.dtype == torch.float64 else w
    tensors = fmt.quantize(w, rounding.coherence if rounding.scale_search else None)
    if rounding.simple:
        return tensors, []
    shape = tuple(w.shape)
    prepared = fmt.prepare(w)
    values, scale = fmt.expand(tensors, shape)
    if len(shape) == 2:
        values, outcome = _learn(fmt, prepared, values, scale, rounding, seed)
        return fmt.with_codes(tensors, values), [outcome]
    outcomes = []
    for i, (matrix, start, one_scale) in enumerate(zip(prepared, values, _each(scale, shape[0]), strict=True)):
        values[i], outcome = _learn(fmt, matrix, start, one_scale, rounding, seed + i)
        outcomes.append(outcome)
    return fmt.with_codes(tensors, values), outcomes


def _each(scale: Tensor, count: int) -> list[Tensor]:
    return list(scale.expand(count, *scale.shape[1:]))


def _learn(
    fmt: Format, w: Tensor, start: Tensor, scale: Tensor, rounding: Rounding, seed: int
) -> tuple[Tensor, Outcome]:
    metric = input_metric(w, rounding.top_p, rounding.min_k, rounding.max_k, rounding.plain_weight, rounding.spectrum)
    problem = Problem(w, scale, start, fmt.grid, metric, seed)
    return learn(problem, rounding)


def learn(problem: Problem, rounding: Rounding) -> tuple[Tensor, Outcome]:
    """Grid values [N,K] of a problem: never worse than the start in its metric, |E| within :data:`FROBENIUS_LIMIT`."""
    before = problem.objective(problem.start)
    attempt = problem
    while True:
        solution = SOLVERS["coordinate_descent"](attempt, rounding.num_iter)
        if not relative_error(problem, solution.values) > FROBENIUS_LIMIT:
            break
        raised = Metric(attempt.metric.right, 2 * max(attempt.metric.plain_weight, 0.05), attempt.metric.left)
        attempt = Problem(problem.weight, problem.scale, problem.start, problem.grid, raised, problem.seed)
    after = problem.objective(solution.values)
    if after > before:
        # Raising λ, or float32 in the last bits of a perfect fit, may lose against the start.
        return problem.start, Outcome(solution.iterations, "nearest is best", before, before)
    return solution.values, Outcome(solution.iterations, solution.stopped, before, after)
