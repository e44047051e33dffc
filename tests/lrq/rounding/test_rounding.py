"""Learned rounding: what counts is the error of the codes on the grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import FORMATS, Format
from lrq.rounding.coordinate_descent import coordinate_descent
from lrq.rounding.metric import Metric, input_metric, leading_directions, subspace_size, sum_of_squares
from lrq.rounding.problem import Problem
from lrq.rounding.solve import FROBENIUS_LIMIT, layer_seed, learn, quantize_layer
from samples import gaussian, low_rank, student

LAYERS = {
    "gaussian": lambda: gaussian(128, 256),
    "low rank": lambda: low_rank(256, 512),
    "wide": lambda: low_rank(64, 768),
    "tall": lambda: student(512, 160),
    "student": lambda: student(256, 256),
}


def problem_of(fmt: Format, w: Tensor, rounding: Rounding = Rounding(), left: Tensor | None = None) -> Problem:  # noqa: B008
    prepared = fmt.prepare(w)
    values, scale = fmt.expand(fmt.quantize(w, rounding.coherence), tuple(w.shape))
    metric = input_metric(
        prepared, rounding.top_p, rounding.min_k, rounding.max_k, rounding.plain_weight, rounding.spectrum
    )
    return Problem(prepared, scale, values, fmt.grid, Metric(metric.right, metric.plain_weight, left), seed=1)


def cases() -> list:
    found = []
    for layer, make in LAYERS.items():
        w = make()
        found += [
            pytest.param(f, w, id=f"{n}-{layer}") for n, f in FORMATS.items() if f.refusal(tuple(w.shape)) is None
        ]
    return found


@pytest.mark.parametrize(("fmt", "w"), cases())
def test_better_in_its_metric_and_frobenius_bounded(fmt: Format, w: Tensor) -> None:
    problem = problem_of(fmt, w)
    values, outcome = learn(problem, Rounding())
    before, after = (problem.objective(v) for v in (problem.start, values))
    assert outcome.objective_before == pytest.approx(before)
    assert outcome.objective_after == pytest.approx(after)
    assert after < before
    assert sum_of_squares(problem.projected(values)) < 0.97 * sum_of_squares(problem.projected(problem.start))
    assert problem.error(values).norm() <= FROBENIUS_LIMIT * problem.error(problem.start).norm()
    assert torch.equal(fmt.grid.nearest(values), values)
    assert outcome.stopped == "converged"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_has_the_reported_error(name: str) -> None:
    fmt, w = FORMATS[name], low_rank(256, 512)
    tensors, (outcome,) = quantize_layer(fmt, w, Rounding(), seed=3)
    values, _ = fmt.expand(tensors, tuple(w.shape))
    problem = problem_of(fmt, w)
    assert outcome.objective_after == pytest.approx(problem.objective(values))


@pytest.mark.parametrize("name", FORMATS)
def test_deterministic(name: str) -> None:
    w = student(128, 256)
    first, second = (quantize_layer(FORMATS[name], w, Rounding(), seed=5)[0] for _ in range(2))
    assert all(torch.equal(first[k].view(-1).view(torch.uint8), second[k].view(-1).view(torch.uint8)) for k in first)


def test_seed_decides_the_order_of_columns() -> None:
    w = student(128, 512)
    weights = [quantize_layer(FORMATS["nvfp4"], w, Rounding(), seed=layer_seed(s, "a"))[0]["weight"] for s in (0, 1)]
    assert not torch.equal(*weights)
    assert layer_seed(0, "a") != layer_seed(0, "b") != layer_seed(1, "b")


def test_simple_is_round_to_nearest() -> None:
    w = student(64, 256)
    for fmt in FORMATS.values():
        if fmt.refusal((64, 256)) is None:
            tensors, outcomes = quantize_layer(fmt, w, Rounding(simple=True), seed=0)
            direct = fmt.quantize(w, 4.0)
            assert outcomes == []
            assert all(
                torch.equal(tensors[k].view(-1).view(torch.uint8), direct[k].view(-1).view(torch.uint8)) for k in direct
            )


def test_expert_banks_are_rounded_matrix_by_matrix() -> None:
    bank = torch.stack([low_rank(64, 128, seed=s) for s in range(3)])
    for name in ("nvfp4", "mxfp8", "fp8", "fp8-row", "int8-row"):
        fmt = FORMATS[name]
        tensors, outcomes = quantize_layer(fmt, bank, Rounding(), seed=9)
        assert len(outcomes) == 3
        for i, matrix in enumerate(bank):
            alone, _ = quantize_layer(fmt, matrix, Rounding(), seed=9 + i)
            assert torch.equal(tensors["weight"][i].view(torch.uint8), alone["weight"].view(torch.uint8)), name


def test_zero_and_degenerate_layers() -> None:
    for w in (
        torch.zeros(32, 64),
        torch.full((32, 64), 0.5),
        torch.eye(64),
        gaussian(1, 64),
        gaussian(64, 1),
        gaussian(1, 1),
    ):
        for fmt in FORMATS.values():
            if fmt.refusal(tuple(w.shape)) is None:
                tensors, (outcome,) = quantize_layer(fmt, w, Rounding(), seed=0)
                assert torch.isfinite(fmt.dequantize(tensors, tuple(w.shape))).all()
                assert outcome.objective_after <= outcome.objective_before


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e30])
def test_the_unit_of_the_weight_does_not_matter(size: float) -> None:
    w = low_rank(64, 128)
    w = w / w.abs().max()
    fmt = FORMATS["int8-row"]
    plain = quantize_layer(fmt, w, Rounding(), seed=0)[1][0]
    scaled = quantize_layer(fmt, w * torch.tensor(size), Rounding(), seed=0)[1][0]
    assert scaled.objective_after / scaled.objective_before == pytest.approx(
        plain.objective_after / plain.objective_before, rel=0.05
    )


def test_both_sides_metric_descends_too() -> None:
    w = low_rank(128, 256)
    left = leading_directions(w.mT.contiguous(), 40)
    problem = problem_of(FORMATS["nvfp4"], w, Rounding(plain_weight=0.1), left)
    solution = coordinate_descent(problem, 50)
    before, after = (problem.objective(v) for v in (problem.start, solution.values))
    assert after < 0.9 * before


def test_one_weight_moves_to_the_best_value_of_its_parabola() -> None:
    """Brute force: at the solution no single weight can move to any other grid value and gain."""
    w = low_rank(24, 64)
    problem = problem_of(FORMATS["nvfp4"], w, Rounding(min_k=8))
    values = coordinate_descent(problem, 1000).values
    best = problem.objective(values)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scale = problem.scale.expand(w.shape)
    for row, column in [(0, 0), (5, 17), (23, 63), (11, 40)]:
        for candidate in torch.cat([grid, -grid]):
            moved = values.clone()
            moved[row, column] = candidate if scale[row, column] > 0 else 0.0
            assert problem.objective(moved) >= best * (1 - 1e-6)


def test_leading_directions_are_those_of_the_svd() -> None:
    for shape in ((96, 64), (64, 96), (64, 64)):
        w = low_rank(*shape).double()
        directions = leading_directions(w, 12)
        exact = torch.linalg.svd(w, full_matrices=False).Vh[:12].mT
        assert torch.allclose(directions.mT @ directions, torch.eye(12, dtype=torch.float64), atol=1e-9)
        assert torch.linalg.matrix_norm(directions.mT @ exact) ** 2 == pytest.approx(12, abs=1e-6)


def test_subspace_size() -> None:
    assert subspace_size((1000, 500), 0.4, 64, 1280) == 200
    assert subspace_size((1000, 100), 0.4, 64, 1280) == 64
    assert subspace_size((20, 30), 0.4, 64, 1280) == 20
    assert subspace_size((9000, 9000), 0.4, 64, 1280) == 1280
    assert subspace_size((1, 5), 0.0, 1, 1) == 1


def test_num_iter_bounds_the_sweeps() -> None:
    w = low_rank(128, 256)
    outcome = quantize_layer(FORMATS["nvfp4"], w, Rounding(num_iter=2), seed=0)[1][0]
    assert (outcome.iterations, outcome.stopped) == (2, "num_iter reached")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_gpu_error_within_a_percent_of_cpu(name: str) -> None:
    fmt, w = FORMATS[name], low_rank(512, 512)
    errors = [quantize_layer(fmt, w.to(d), Rounding(), seed=0)[1][0].objective_after for d in ("cpu", "cuda")]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
