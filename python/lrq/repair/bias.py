"""Bias correction: the mean of a layer's error goes into its bias, the rest of the error is what it was.

The outputs of a layer are off by Ex, E = Ŵ − W; over the inputs that is Eμ on average, which b ← b − Eμ takes away
(Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2; here μ is
measured).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats

CHUNK = 1 << 20
"""Weights in float64 at a time."""


@dataclass(frozen=True)
class OutputError:
    """What the statistics say of outputs y = Wx: sums of squares over outputs, of means over the inputs."""

    signal: float
    """E|Wx|²"""
    noise: float
    """E|Ex|²"""
    mean: float
    """The part of the noise that the bias takes away: |Eμ|² before it is rounded to its dtype."""
    nearest: float
    """E|E0 x|², E0 the error of round-to-nearest with amax scales."""
    moved: float
    """|s|², s by how much the bias moves."""

    def __add__(self, other: OutputError) -> OutputError:
        return OutputError(
            self.signal + other.signal,
            self.noise + other.noise,
            self.mean + other.mean,
            self.nearest + other.nearest,
            self.moved + other.moved,
        )

    def with_bias(self, shift: Tensor, moved: Tensor) -> OutputError:
        """With a bias that moved by s, ``moved`` [N], where Eμ is ``shift`` [N].

        E|Ex − s|² = E|Ex|² − 2 Eμ·s + |s|².
        """
        squares = moved.double().square().sum().item()
        return replace(self, mean=2 * (shift.double() * moved.double()).sum().item() - squares, moved=squares)

    @property
    def of_nearest(self) -> float:
        """sqrt(E|E0 x|² / E|Wx|²)"""
        return (max(self.nearest, 0.0) / self.signal) ** 0.5 if self.signal > 0 else 0.0

    @property
    def before(self) -> float:
        """sqrt(E|Ex|² / E|Wx|²)"""
        return (max(self.noise, 0.0) / self.signal) ** 0.5 if self.signal > 0 else 0.0

    @property
    def shift(self) -> float:
        """|s| / sqrt(E|Wx|²), by how much a corrected bias moves."""
        return (self.moved / self.signal) ** 0.5 if self.signal > 0 else 0.0

    @property
    def after(self) -> float:
        """The same with the bias corrected."""
        return (max(self.noise - self.mean, 0.0) / self.signal) ** 0.5 if self.signal > 0 else 0.0


def mean_shift(w: Tensor, stored: Tensor, mean: Tensor) -> Tensor:
    """Eμ: what the outputs of ``stored`` have more than those of ``w`` on average.

    Args:
        w, stored: [N,K], the weight and what its codes stand for.
        mean: float64 [K], μ.

    Returns:
        float64 [N].
    """
    rows = max(1, CHUNK // w.shape[1])
    parts = zip(w.split(rows), stored.split(rows), strict=True)
    # Row by row, unlike a matrix product: the bits don't depend on how many rows there are.
    return torch.cat([(ours.double() - exact.double()).mul_(mean).sum(1) for exact, ours in parts])


def corrected(bias: Tensor, shift: Tensor) -> Tensor:
    """b − Eμ in float64, rounded to the bias's dtype.

    Raises:
        ValueError: the result leaves the dtype.
    """
    moved = (bias.double() - shift.to(bias.device)).to(bias.dtype)
    if not torch.isfinite(moved).all():
        raise ValueError("its corrected bias is not finite")
    return moved


def output_error(w: Tensor, stored: Tensor, nearest: Tensor, stats: InputStats) -> OutputError:
    """The error of the outputs under the statistics, for a weight, what is stored of it, and its nearest codes.

    All are [N,K], or [E,N,K] of a bank whose experts have the same inputs.

    Second moments that are not there count as those of uncorrelated inputs around the mean.
    """
    total = OutputError(0.0, 0.0, 0.0, 0.0, 0.0)
    rows = max(1, CHUNK // w.shape[-1])
    form = _SecondMoment(stats, w.device)
    parts = (one.flatten(0, -2).split(rows) for one in (w, stored, nearest))
    for exact, ours, plain in zip(*parts, strict=True):
        error = ours.float() - exact.float()
        mean = (error @ form.mean).double().square().sum().item()
        total += OutputError(form(exact.float()), form(error), mean, form(plain.float() - exact.float()), mean)
    return total


class _SecondMoment:
    """tr(M E[xx'] M') of float32 matrices M [n,K]."""

    def __init__(self, stats: InputStats, device: torch.device) -> None:
        self.mean = stats.mean.float().to(device)
        self._gram = None if stats.gram is None else stats.gram.to(device)
        second = stats.second
        if stats.vectors is not None and stats.values is not None:
            factor = stats.vectors.double() * stats.values.double().clamp(min=0).sqrt()
        else:
            factor = stats.mean[:, None]
        self._factor = factor.float().to(device)
        self._rest = (second - factor.square().sum(1)).clamp(min=0).float().to(device)

    def __call__(self, m: Tensor) -> float:
        if self._gram is not None:
            return ((m @ self._gram) * m).sum(dtype=torch.float64).item()
        leading = (m @ self._factor).double().square().sum()
        return (leading + (m.square() @ self._rest).sum(dtype=torch.float64)).item()
