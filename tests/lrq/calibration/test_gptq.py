"""GPTQ: the same codes as the textbook in float64, less error of outputs, and statistics of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from checkpoints import normal, same_bytes
from lrq.config import Rounding
from lrq.errors import InputError
from lrq.formats import FORMATS, Format
from lrq.rounding.ladder import Ladder
from lrq.rounding.moments import DAMPING, KEPT_MEAN, Moments, UnfitStatisticsError, falling_order
from lrq.rounding.problem import Problem
from lrq.rounding.solve import learn, problem_of, quantize_layer
from measured import inputs, statistics
from samples import low_rank

CPU = torch.device("cpu")
RANK = {"gram_limit": 1, "rank": 16}
"""Options of statistics that hold a few eigenpairs."""


def moments(fmt: Format, x: Tensor, bias_corrected: bool = False, **options: int) -> Moments:
    return Moments(fmt, statistics(x, **options), CPU, bias_corrected)


def rounded(fmt: Format, w: Tensor, known: Moments | None, **settings: object) -> Tensor:
    tensors, _ = quantize_layer(fmt, w, Rounding(**settings), 0, known)
    return fmt.dequantize(tensors, tuple(w.shape))


def textbook(problem: Problem, h: Tensor, candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """GPTQ of Frantar et al. 2023, algorithm 1, in float64: codes [N,K] and scales [N,blocks] of one matrix.

    ``candidates`` are scales [N,blocks]; all columns of a block are rounded with each of them, and the one with the
    least sum of ``(error of the column)² / [H⁻¹]_jj`` stays.
    """
    order, width = problem.metric.order.tolist(), problem.block[1]
    inverse = torch.linalg.inv(h.double() + (DAMPING if h.any() else 1.0) * torch.eye(len(h), dtype=torch.float64))
    w = problem.weight[0].double().clone()
    codes, scales = torch.zeros_like(w), candidates[0].clone().double()

    def step(w: Tensor, inverse: Tensor, j: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        code = problem.grid.nearest(torch.where(scale > 0, w[:, j] / scale, 0.0).float()).double()
        error = (w[:, j] - code * scale) / inverse[j, j]
        left = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        return code, w - error[:, None] * inverse[j], left, error.square() * inverse[j, j]

    while order:
        part = [j for j in order[:width] if j // width == order[0] // width]
        order, block = order[len(part) :], part[0] // width
        found = []
        for candidate in candidates:
            now, left, loss, own = w, inverse, 0.0, {}
            for j in part:
                own[j], now, left, more = step(now, left, j, candidate[:, block].double())
                loss = loss + more
            found.append((loss, now, own, candidate[:, block].double()))
        best = torch.stack([one[0] for one in found]).argmin(0)
        pick = torch.arange(len(w))
        w = torch.stack([one[1] for one in found])[best, pick]
        scales[:, block] = torch.stack([one[3] for one in found])[best, pick]
        for j in part:
            codes[:, j] = torch.stack([one[2][j] for one in found])[best, pick]
        inverse = left
    return codes, scales


@pytest.mark.parametrize("name", ["fp8-row", "int8-row", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("columns", [96, 75])
def test_the_codes_are_those_of_the_textbook(name: str, columns: int) -> None:
    fmt, w = FORMATS[name], low_rank(24, columns)
    known = moments(fmt, inputs(500, columns))
    problem = problem_of(fmt, w, fmt.quantize(w, 4.0), Rounding(), 0, known)
    if not fmt.has_fine_scales:
        scale = problem.spread_scale().expand(problem.weight.shape).contiguous()
        problem = replace(problem, block=(1, 1), scale=scale)
        candidates = [scale[0]]
    else:
        candidates = [one[0] for one in problem.ladder.around(problem.scale)]
    solution, (outcome,) = learn(problem, Rounding())
    codes, scales = textbook(problem, known.matrix(), candidates)
    # Where float32 sees a tie in another light, the columns after it differ as well.
    assert (solution.values[0].double() != codes).double().mean() < 0.01
    theirs = replace(problem, scale=scales[None].float()).objective(codes[None].bfloat16()).item()
    assert outcome.objective_after == pytest.approx(theirs, rel=1e-3)
    assert outcome.stopped == "all columns rounded" and theirs < 0.7 * outcome.objective_before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [{}, RANK | {"rank": 40}], ids=["whole", "eigenpairs"])
def test_outputs_of_other_inputs_are_closer(name: str, options: dict[str, int]) -> None:
    fmt, w, columns = FORMATS[name], low_rank(128, 256), 256
    x = inputs(4000, columns)
    seen, others = x[:3000], x[3000:].double()

    def error(stored: Tensor) -> float:
        return (others @ (stored.double() - w.double()).mT).square().mean().sqrt().item()

    nearest = error(fmt.dequantize(fmt.quantize(w, None), tuple(w.shape)))
    learned = error(rounded(fmt, w, None))
    most = 0.85 if options else 0.75
    assert error(rounded(fmt, w, moments(fmt, seen, **options))) < most * min(nearest, learned)


@pytest.mark.parametrize("optimizer", ["discrete", "coordinate_descent"])
def test_other_solvers_follow_the_statistics_too(optimizer: str) -> None:
    fmt, w, x = FORMATS["nvfp4"], low_rank(64, 128), inputs(2000, 128)
    noise = [
        (x @ (rounded(fmt, w, known, optimizer=optimizer, num_iter=100) - w).mT).norm().item()
        for known in (None, moments(fmt, x))
    ]
    assert noise[1] < 0.75 * noise[0]


ODD: dict[str, Tensor] = {
    "dead inputs": inputs(500, 96) * (torch.arange(96) >= 40),
    "rank 5": normal(500, 5) @ normal(5, 96, seed=1),
    "five samples": inputs(5, 96),
    "one sample": inputs(1, 96),
    "zeros": torch.zeros(10, 96),
    "tiny": 1e-18 * inputs(500, 96),
    "huge": 1e15 * inputs(500, 96),
    "one loud input": inputs(500, 96) * torch.where(torch.arange(96) == 7, 1e4, 1.0),
}


@pytest.mark.parametrize("bias_corrected", [False, True])
@pytest.mark.parametrize("options", [{}, RANK, RANK | {"rank": 0}])
@pytest.mark.parametrize("kind", ODD)
def test_poor_statistics_do_no_harm(kind: str, options: dict[str, int], bias_corrected: bool) -> None:
    w = low_rank(32, 96)
    for name in ("nvfp4", "mxfp8", "int8-row", "fp8"):
        fmt = FORMATS[name]
        known = moments(fmt, ODD[kind], bias_corrected, **options)
        for settings in ({}, {"simple": True}, {"optimizer": "gptq"}):
            error = rounded(fmt, w, known, **settings) - w
            nearest = fmt.dequantize(fmt.quantize(w, None), tuple(w.shape)) - w
            assert error.isfinite().all()
            assert error.norm() < 4 * nearest.norm(), (name, settings)
            if kind == "zeros":
                assert error.norm() <= 1.001 * nearest.norm(), (name, settings)
            # What no input has shown must not be given up.
            for i in range(0, 96, 32):
                assert error[:, i : i + 32].norm() < 5 * nearest[:, i : i + 32].norm(), (name, settings)


def test_moments_that_no_inputs_have_are_refused() -> None:
    fmt, stats = FORMATS["nvfp4"], statistics(inputs(100, 32))
    bad = Moments(fmt, replace(stats, gram=stats.gram - 5 * torch.eye(32)), CPU)
    with pytest.raises(UnfitStatisticsError, match="negative eigenvalue"):
        quantize_layer(fmt, low_rank(16, 32), Rounding(), 0, bad)


def test_the_solver_needs_statistics() -> None:
    with pytest.raises(InputError, match="--optimizer gptq: needs statistics"):
        quantize_layer(FORMATS["nvfp4"], low_rank(16, 32), Rounding(optimizer="gptq"), 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("settings", [{}, {"simple": True}, {"optimizer": "discrete", "num_iter": 20}])
def test_matrices_of_a_bank_have_the_bytes_that_they_have_alone(name: str, settings: dict[str, object]) -> None:
    fmt, bank = FORMATS[name], torch.stack([low_rank(128, 256), 3 * low_rank(128, 256, 1), torch.zeros(128, 256)])
    if settings.get("optimizer") and name not in ("nvfp4", "fp8"):
        return
    known = moments(fmt, inputs(400, 256))
    tensors, _ = quantize_layer(fmt, bank, Rounding(**settings), 0, known)
    for i, w in enumerate(bank):
        alone, _ = quantize_layer(fmt, w[None], Rounding(**settings), 0, known)
        assert all(same_bytes(tensor[i], alone[suffix][0]) for suffix, tensor in tensors.items())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("columns", [64, 90])
def test_weighted_scales_are_the_best_ones(name: str, columns: int) -> None:
    """Every scale within reach is tried by hand, in float64."""
    # MXFP8's powers of two seldom leave a choice: of this seed's blocks one.
    fmt, w = FORMATS[name], low_rank(12, columns, seed=31)
    known = moments(fmt, inputs(300, columns))
    plain = fmt.quantize(w, 4.0)
    tensors, _ = quantize_layer(fmt, w, Rounding(simple=True), 0, known)
    shape, width = tuple(w.shape), fmt.block_shape(tuple(w.shape))[1]
    before, after = (fmt.scale_codes(one, shape) for one in (plain, tensors))
    weights = known.weights().double()

    def loss(block: slice, row: int, code: Tensor) -> float:
        scale = fmt.scales_of(code.view(1, 1), plain).double().item()
        part = w[row, block].double()
        error = fmt.grid.nearest((part / scale).float()).double() * scale - part
        return (error.square() * weights[block]).sum().item()

    for row in range(12):
        for i in range(before.shape[1]):
            block = slice(i * width, min((i + 1) * width, columns))
            tried = before[row, i] + torch.tensor(list(fmt.scale_reach))
            best = min(loss(block, row, code) for code in tried)
            assert loss(block, row, after[row, i]) == pytest.approx(best, rel=1e-4, abs=1e-12)
    assert not torch.equal(before, after)


def test_a_ladder_holds_the_scales_around_a_scale() -> None:
    ladder = Ladder(torch.tensor([[0.0, 1, 2, 4, 8]]), range(-2, 2), fine=True)
    assert ladder.around(torch.tensor([[[4.0, 1.0, 0.0]]])).flatten(1).mT.tolist() == [
        [1, 2, 4, 8],
        [1, 1, 1, 2],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize("options, off", [({}, 1e-5), (RANK | {"rank": 30}, 0.2), (RANK | {"rank": 0}, 0.4)])
def test_a_corrected_bias_leaves_the_covariance(options: dict[str, int], off: float) -> None:
    """Of the mean a share stays; what the statistics do not hold keeps H positive."""
    x = inputs(2000, 48) + 2
    h = moments(FORMATS["fp8"], x, True, **options).matrix().double()
    assert torch.linalg.eigvalsh(h).min() > -1e-6
    mean = x.double().mean(0)
    exact = x.double().mT @ x.double() / len(x) - (1 - KEPT_MEAN) * torch.outer(mean, mean)
    exact /= exact.diagonal().mean()
    assert h.diagonal().mean().item() == pytest.approx(1, abs=0.02)
    assert (h - exact).norm() <= off * exact.norm()


def test_moments_are_of_the_inputs_that_a_format_sees() -> None:
    fmt, x = FORMATS["int8-row-convrot"], inputs(600, 256)
    h = moments(fmt, x).matrix()
    rotated = fmt.prepare(x)
    expected = rotated.mT @ rotated / len(x)
    expected /= expected.diagonal().mean()
    assert (h - expected).norm() < 1e-4 * expected.norm()


def test_blocks_and_columns_by_falling_power() -> None:
    order = falling_order(torch.tensor([1.0, 2, 9, 8, 3, 4, 100]), 2)
    assert order.tolist() == [2, 3, 5, 4, 1, 0, 6]


def test_what_is_known_is_said() -> None:
    def about(**options: int) -> str:
        return statistics(inputs(50, 32), **options).about

    assert about() == "50 tokens, E[xx'] whole"
    assert about(gram_limit=1, rank=8) == "50 tokens, 8 eigenpairs of E[xx']"
    assert about(gram_limit=1, rank=0) == "50 tokens, mean and E[x²]"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4", "fp8", "int8-row"])
def test_a_gpu_replays_what_the_cpu_does(name: str) -> None:
    fmt, w, stats = FORMATS[name], low_rank(256, 512), statistics(inputs(2000, 512))
    ends = [
        quantize_layer(fmt, w.to(d), Rounding(), 0, Moments(fmt, stats, torch.device(d)))[1][0].objective_after
        for d in ("cpu", "cuda")
    ]
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
