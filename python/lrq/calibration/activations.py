"""Statistics of what an activation function gives, from statistics of the inputs of the layer in front of it.

A feature y = w·x + c of many independent inputs is nearly normal, with mean w·μ + c and variance Σ w²·Var(x). Moments
of act(y) are integrals over that normal, here by Gauss-Hermite quadrature; of a gated pair act(y)·u, u is normal given
y, with the covariance of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from lrq.calibration.inputs import BINS, InputStats, magnitude_bins

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda y: gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "relu": relu,
    "silu": silu,
}
"""By the names that presets use."""
NODES = 32
"""Of the quadrature."""
QUANTILES = 32
"""Of each normal, for the histogram."""
CHUNK, ROWS = 1 << 22, 1 << 12
"""Weights that are squared, and features whose products are counted, at a time."""


@dataclass(frozen=True)
class Feature:
    """Normal features [N] of a layer."""

    mean: Tensor
    deviation: Tensor


def features_of(weight: Tensor, bias: Tensor | None, inputs: InputStats) -> Feature:
    """The features of a layer [N,K] whose inputs are known and count as independent."""
    mean, variance = _moments(weight, weight, inputs)
    return Feature(mean if bias is None else mean + bias.double(), variance.clamp(min=0).sqrt())


def _moments(a: Tensor, b: Tensor, inputs: InputStats) -> tuple[Tensor, Tensor]:
    """Means of the features of ``a``, and their covariances with those of ``b``, float64 [N]."""
    spread = (inputs.second - inputs.mean.square()).clamp(min=0).float()
    rows = max(1, CHUNK // a.shape[1])
    mean = torch.cat([part.float() @ inputs.mean.float() for part in a.split(rows)])
    pairs = zip(a.split(rows), b.split(rows), strict=True)
    return mean.double(), torch.cat([(p.float() * q.float()) @ spread for p, q in pairs]).double()


def activated(function: str, feature: Feature, tokens: int, deviations: float) -> InputStats:
    """Statistics of ``act(y)``; the largest lies ``deviations`` from the mean."""
    act = FUNCTIONS[function]
    nodes, weights = _nodes()
    values = act(feature.mean[:, None] + feature.deviation[:, None] * nodes)
    far = act(feature.mean[:, None] + feature.deviation[:, None] * torch.tensor([-deviations, deviations]))
    grid = act(feature.mean[:, None] + feature.deviation[:, None] * _quantiles())
    return _stats(values @ weights, values.square() @ weights, far.abs().amax().item(), [grid], tokens)


def gated(
    function: str,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    inputs: InputStats,
    tokens: int,
    deviations: float,
) -> InputStats:
    """Statistics of ``act(y)·u`` for two layers (weight [N,K], bias [N]) with the same inputs."""
    act = FUNCTIONS[function]
    y, u = features_of(*gate, inputs), features_of(*up, inputs)
    covariance = _moments(gate[0], up[0], inputs)[1]
    # Of u, what y says and what is left.
    shared = torch.where(y.deviation > 0, covariance / y.deviation, 0.0)
    shared = shared.clamp(-u.deviation, u.deviation)
    left = (u.deviation.square() - shared.square()).clamp(min=0)
    nodes, weights = _nodes()
    opened = act(y.mean[:, None] + y.deviation[:, None] * nodes)
    known = u.mean[:, None] + shared[:, None] * nodes
    mean = (opened * known) @ weights
    second = (opened.square() * (known.square() + left[:, None])) @ weights
    far = torch.tensor([-deviations, deviations], dtype=torch.float64)
    most = act(y.mean[:, None] + y.deviation[:, None] * far).abs().amax(1) * (u.mean.abs() + deviations * u.deviation)
    z = _quantiles()
    opened = act(y.mean[:, None] + y.deviation[:, None] * z)
    known = u.mean[:, None] + shared[:, None] * z
    parts = zip(opened.split(ROWS), known.split(ROWS), left.sqrt().split(ROWS), strict=True)
    grids = (a[:, :, None] * (b[:, :, None] + c[:, None, None] * z) for a, b, c in parts)
    return _stats(mean, second, most.amax().item(), grids, tokens)


def _nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the expectation over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def _quantiles() -> Tensor:
    return torch.special.ndtri((torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES)


def _stats(mean: Tensor, second: Tensor, amax: float, grids: Iterable[Tensor], tokens: int) -> InputStats:
    bins = torch.zeros(BINS, dtype=torch.int64)
    for grid in grids:
        bins += magnitude_bins(grid.float())
    # As many as that many tokens have, one at least where there is one.
    counts = (bins.double() * (tokens * len(mean) / bins.sum())).ceil().long()
    return InputStats(tokens, mean, torch.maximum(second, mean.square()), amax, counts)
