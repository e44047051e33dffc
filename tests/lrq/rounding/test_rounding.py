"""Learned rounding: what counts is the error of the codes on the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import FORMATS, Format
from lrq.rounding import discrete
from lrq.rounding.coordinate_descent import coordinate_descent
from lrq.rounding.metric import leading_directions, subspace_size, sum_of_squares
from lrq.rounding.problem import Problem
from lrq.rounding.solve import FROBENIUS_LIMIT, SOLVERS, layer_seed, learn, problem_of, quantize_layer, quantize_layers
from samples import gaussian, low_rank, student

LAYERS = {
    "gaussian": lambda: gaussian(128, 256),
    "low rank": lambda: low_rank(256, 512),
    "wide": lambda: low_rank(64, 768),
    "tall": lambda: student(512, 160),
    "student": lambda: student(256, 256),
}


def problem_for(fmt: Format, w: Tensor, rounding: Rounding = Rounding()) -> Problem:  # noqa: B008
    tensors = fmt.quantize(w, rounding.coherence)
    return problem_of(fmt, w, tensors, rounding, seed=1)


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
    problem = problem_for(fmt, w)
    solution, (outcome,) = learn(problem, Rounding())
    values = solution.values
    before, after = (problem.objective(v) for v in (problem.start, values))
    assert outcome.objective_before == pytest.approx(before)
    assert outcome.objective_after == pytest.approx(after)
    assert after < before
    # The more the plain error weighs, the less the projected one falls.
    limit = 1 - 0.09 / max(3.0, fmt.plain_weight)
    assert sum_of_squares(problem.projected(values)) < limit * sum_of_squares(problem.projected(problem.start))
    assert problem.error(values).norm() <= FROBENIUS_LIMIT * problem.error(problem.start).norm()
    assert torch.equal(fmt.grid.nearest(values.float()).bfloat16(), values)
    assert outcome.stopped == "converged"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_has_the_reported_error(name: str) -> None:
    fmt, w = FORMATS[name], low_rank(256, 512)
    tensors, (outcome,) = quantize_layer(fmt, w, Rounding(), seed=3)
    values, _ = fmt.expand(tensors, tuple(w.shape))
    problem = problem_for(fmt, w)
    assert outcome.objective_after == pytest.approx(problem.objective(values))


@pytest.mark.parametrize("name", FORMATS)
def test_deterministic(name: str) -> None:
    w = student(128, 256)
    first, second = (quantize_layer(FORMATS[name], w, Rounding(), seed=5)[0] for _ in range(2))
    assert all(torch.equal(first[k].view(-1).view(torch.uint8), second[k].view(-1).view(torch.uint8)) for k in first)


def test_seed_decides_the_choices() -> None:
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
            alone, _ = quantize_layer(fmt, matrix, Rounding(), seed=9)
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


@pytest.mark.parametrize("optimizer", ["discrete", "coordinate_descent"])
def test_both_sides_and_a_small_plain_weight_lower_the_projected_error_most(optimizer: str) -> None:
    w, rounding = (
        low_rank(256, 512),
        Rounding(projection="both", plain_weight=0.1, top_p=0.2, optimizer=optimizer, num_iter=200),
    )
    if optimizer == "coordinate_descent":
        rounding = replace(rounding, num_iter=10)
    problem = problem_for(FORMATS["nvfp4"], w, rounding)
    assert problem.metric.left is not None
    values = learn(problem, rounding)[0].values
    before, after = (sum_of_squares(problem.projected(v)).sqrt().item() for v in (problem.start, values))
    assert after < (0.4 if optimizer == "discrete" else 0.7) * before


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8-row"])
def test_discrete_ends_where_coordinate_descent_does(name: str) -> None:
    problem = problem_for(FORMATS[name], low_rank(256, 512))
    ends = [
        problem.objective(SOLVERS[s](problem, Rounding()).values).item() for s in ("discrete", "coordinate_descent")
    ]
    assert ends[0] == pytest.approx(ends[1], rel=0.01)


def test_products_in_bfloat16_change_the_end_by_less_than_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    for rounding in (Rounding(), Rounding(projection="both", plain_weight=0.1, top_p=0.2)):
        problem = problem_for(FORMATS["nvfp4"], low_rank(256, 512), rounding)
        ends = []
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(discrete, "product_dtype", lambda device, dtype=dtype: dtype)
            ends.append(problem.objective(discrete.discrete(problem, rounding).values).item())
        assert ends[1] == pytest.approx(ends[0], rel=0.01)
        assert ends[1] != ends[0]


def test_one_weight_moves_to_the_best_value_of_its_parabola() -> None:
    """Brute force: at the solution no single weight can move to any other grid value and gain."""
    w = low_rank(24, 64)
    problem = problem_for(FORMATS["nvfp4"], w, Rounding(min_k=8))
    values = coordinate_descent(problem, Rounding()).values
    best = problem.objective(values).item()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scale = problem.spread_scale()[0].expand(w.shape)
    for row, column in [(0, 0), (5, 17), (23, 63), (11, 40)]:
        for candidate in torch.cat([grid, -grid]):
            moved = values.clone()
            moved[0, row, column] = candidate if scale[row, column] > 0 else 0.0
            assert problem.objective(moved).item() >= best * (1 - 1e-6)


def test_layers_of_one_shape_are_rounded_together_as_well_as_alone() -> None:
    weights = [low_rank(64, 128, seed=s) for s in range(3)] + [torch.zeros(64, 128)]
    for name in ("nvfp4", "fp8", "int8-row-convrot", "mxfp8"):
        fmt = FORMATS[name]
        if fmt.refusal((64, 128)) is not None:
            continue
        for w, (tensors, (outcome,)) in zip(weights, quantize_layers(fmt, weights, Rounding(), seed=4), strict=True):
            alone, (alone_outcome,) = quantize_layer(fmt, w, Rounding(), seed=4)
            assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in alone.items()}
            assert outcome.objective_after == pytest.approx(alone_outcome.objective_after, rel=0.005)


def test_leading_directions_are_those_of_the_svd() -> None:
    for shape in ((96, 64), (64, 96), (64, 64)):
        w = low_rank(*shape).double()
        directions = leading_directions(w, 12)
        exact = torch.linalg.svd(w, full_matrices=False).Vh[:12].mT
        assert torch.allclose(directions.mT @ directions, torch.eye(12, dtype=torch.float64), atol=1e-9)
        assert torch.linalg.matrix_norm(directions.mT @ exact) ** 2 == pytest.approx(12, abs=1e-6)


def test_subspace_size() -> None:
    default = Rounding()
    assert subspace_size((1000, 500), default, 0.4) == 200
    assert subspace_size((1000, 500), replace(default, top_p=0.3), 0.4) == 150
    assert subspace_size((1000, 100), default, 0.4) == 64
    assert subspace_size((20, 30), default, 0.4) == 20
    assert subspace_size((9000, 9000), default, 0.4) == 1280
    assert subspace_size((1, 5), Rounding(top_p=0.0, min_k=1, max_k=1), 0.4) == 1


@pytest.mark.parametrize("optimizer", [name for name in SOLVERS if name != "gptq"])
def test_num_iter_bounds_the_iterations(optimizer: str) -> None:
    rounding = Rounding(num_iter=2, optimizer=optimizer)
    outcome = quantize_layer(FORMATS["nvfp4"], low_rank(128, 256), rounding, seed=0)[1][0]
    assert (outcome.iterations, outcome.stopped) in ((2, "num_iter reached"), (2, "nearest is best"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_gpu_error_within_a_percent_of_cpu(name: str) -> None:
    fmt, w = FORMATS[name], low_rank(512, 512)
    errors = [quantize_layer(fmt, w.to(d), Rounding(), seed=0)[1][0].objective_after for d in ("cpu", "cuda")]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
