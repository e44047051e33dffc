"""The step of discrete rounding does what its objective says; that backends agree is asked in test_bits.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrq_kernels import rounding_step
from lrq_kernels.minifloat import decode_e2m1, decode_e4m3
from lrq_kernels.ops.rounding_step import GRIDS, key_of
from lrq_kernels.reference.rounding_step import fractions, gap
from samples import NEAREST, gaussian, spread, step_arguments

NUMBERS = {
    "e2m1": decode_e2m1(torch.arange(8, dtype=torch.uint8)),
    "e4m3": decode_e4m3(torch.arange(127)),
    "int8": torch.arange(128.0),
}
"""Every magnitude of a grid, in order."""


@pytest.mark.parametrize("grid", GRIDS)
def test_gaps_are_those_between_neighbours(grid: str) -> None:
    positive = NUMBERS[grid]
    every = torch.cat([-positive.flip(0), positive[1:]])
    step = every.diff()
    assert torch.equal(gap(every[:-1], torch.tensor(-1.0).expand(len(step)), GRIDS[grid]), step)
    assert torch.equal(gap(every[1:], torch.tensor(1.0).expand(len(step)), GRIDS[grid]), step)
    zero = torch.tensor([-0.0, 0.0])
    for slope in (-1.0, 1.0):
        assert torch.equal(gap(zero, torch.full((2,), slope), GRIDS[grid]), positive[1].expand(2))
    # Beyond the last number is none.
    last = positive[-1:]
    assert last + gap(last, torch.tensor([-1.0]), GRIDS[grid]) > GRIDS[grid].largest == last


class Metric:
    """Random orthonormal U and V, and a rounded matrix in float64."""

    def __init__(self, grid: str, share: float, seed: int = 0, plain_weight: float = 0.1) -> None:
        weight, self.block = gaussian(24, 40, seed=seed), (1, 8)
        self.left, self.right = (torch.linalg.qr(gaussian(n, 6, seed=n).double()).Q for n in weight.shape)
        arguments = list(step_arguments(weight, grid, self.block, plain_weight=plain_weight, share=share))
        self.scale = spread(arguments[2], self.block, weight.shape).double()
        self.weight, self.plain_weight = weight.double(), plain_weight
        self.values = arguments[1].double()
        self.left_part, self.right_part = self.left @ self.left.mT, self.right @ self.right.mT
        arguments[5] = (self.left_part @ self.error(self.values) @ self.right_part).float()
        arguments[6:8] = (self.left_part.diagonal().float(), self.right_part.diagonal().float())
        self.arguments = arguments

    def error(self, values: Tensor) -> Tensor:
        return values * self.scale - self.weight

    def objective(self, values: Tensor) -> float:
        error = self.error(values)
        inner = self.left.mT @ error @ self.right
        return float(inner.square().sum() + self.plain_weight * error.square().sum())

    def change(self, i: int, j: int, value: float) -> float:
        """Of the objective, if one weight takes ``value``."""
        values = self.values.clone()
        values[i, j] = value
        return self.objective(values) - self.objective(self.values)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_moves_gains_and_what_stays_would_not(grid: str) -> None:
    metric = Metric(grid, share=1.0)
    values = rounding_step(*metric.arguments)[0].double()
    moved = values != metric.values
    assert moved.any() and not moved.all()
    numbers = torch.cat([-NUMBERS[grid].flip(0), NUMBERS[grid][1:]]).double()
    unit = metric.objective(metric.values) / values.numel()
    for i in range(len(values)):
        for j in range(values.shape[1]):
            if moved[i, j]:
                assert metric.change(i, j, float(values[i, j])) < 0
            else:
                place = int(torch.searchsorted(numbers, metric.values[i, j]))
                for neighbour in {max(place - 1, 0), min(place + 1, len(numbers) - 1)} - {place}:
                    assert metric.change(i, j, float(numbers[neighbour])) > -1e-3 * unit


@pytest.mark.parametrize("grid", GRIDS)
def test_a_small_share_lowers_the_objective(grid: str) -> None:
    metric = Metric(grid, share=0.1)
    values, error, sums = rounding_step(*metric.arguments)
    assert metric.objective(values.double()) < metric.objective(metric.values)
    assert torch.equal(NEAREST[grid](values.float()), values.float())
    assert int(sums[:, 1].sum()) == int((values != metric.arguments[1]).sum()) > 0
    expected = metric.error(values.double())
    assert torch.allclose(error.double(), expected, rtol=2**-8, atol=1e-9)
    assert torch.allclose(sums[:, 0].sum().double(), expected.square().sum(), rtol=1e-5)


def test_share_zero_moves_nothing() -> None:
    arguments = step_arguments(gaussian(2, 60, 80), share=0.0)
    values, error, sums = rounding_step(*arguments)
    assert torch.equal(values, arguments[1]) and not sums[..., 1].any()
    scale = spread(arguments[2], (1, 16), values.shape)
    assert torch.equal(error, (arguments[1].float() * scale - arguments[0]).bfloat16())


def test_nothing_moves_without_a_scale_or_a_curvature() -> None:
    arguments = list(step_arguments(gaussian(60, 80), share=1.0, plain_weight=0.0))
    assert rounding_step(*arguments)[2][:, 1].any()
    for position in (2, 6, 7):
        changed = [torch.zeros_like(a) if i == position else a for i, a in enumerate(arguments)]
        assert not rounding_step(*changed)[2][:, 1].any()


def test_each_matrix_has_its_share_and_each_step_its_weights() -> None:
    weight = gaussian(300, 200)
    all_that_gain = rounding_step(*step_arguments(weight, "int8", share=1.0))[0]
    start = step_arguments(weight, "int8")[1]
    gains = all_that_gain != start
    found = []
    for step in range(2):
        moved = rounding_step(*step_arguments(weight, "int8", share=0.25, step=step))[0]
        chosen = moved != start
        assert torch.equal(moved[chosen], all_that_gain[chosen])
        assert abs(float(chosen.sum() / gains.sum()) - 0.25) < 0.02
        found.append(chosen)
    assert abs(float((found[0] & found[1]).sum() / gains.sum()) - 0.25**2) < 0.01


def test_hashes_are_even_and_unlike_their_neighbours() -> None:
    rows, columns = 512, 1024
    for seed in range(3):
        x = fractions(rows, columns, key_of(seed, 5), torch.device("cpu")).double() / 2**24
        assert abs(x.mean() - 0.5) < 3e-3 and abs(x.var() - 1 / 12) < 1e-3
        for other in (x.roll(1, 1), x.roll(1, 0), fractions(rows, columns, key_of(seed, 6), x.device) / 2**24):
            assert abs(((x - 0.5) * (other - 0.5)).mean()) < 1e-3
    assert len({key_of(seed, step) for seed in range(100) for step in range(100)}) > 9990
    assert key_of(-1, -1) == key_of((1 << 64) - 1, (1 << 64) - 1)
