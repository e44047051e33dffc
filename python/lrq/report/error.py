"""Error of a stored layer against its source, and against round-to-nearest with amax scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import Format, Tensors
from lrq.rounding.metric import leading_directions, subspace_size

GROUP = 32
"""Neighbours of a row whose error is looked at together."""
CHUNK = 1 << 20
"""Weights in float64 at a time."""


@dataclass(frozen=True)
class LayerError:
    """Sums over the layer's matrices, of squares."""

    weight: float
    """|W|^2"""
    plain: float
    """|E|^2"""
    projected: float
    """|EV|^2, V the exact leading input directions of W."""
    nearest_plain: float
    """|E0|^2, E0 the error of round-to-nearest with amax scales in the same format."""
    nearest_projected: float
    """|E0 V|^2"""
    searched_plain: float
    """|E1|^2, E1 the error of round-to-nearest after the recorded scale search; |E0|^2 if there is none."""
    outlier: float = 0.0
    """No sum: the largest |E| of :data:`GROUP` neighbours of a row, in units of the largest of their |E0|, |E1| and
    |W|/10."""

    def __add__(self, other: LayerError) -> LayerError:
        a, b, c, d, e, f = (x + y for x, y in zip(self._sums(), other._sums(), strict=True))
        return LayerError(a, b, c, d, e, f, max(self.outlier, other.outlier))

    def _sums(self) -> tuple[float, ...]:
        nearest = self.nearest_plain, self.nearest_projected, self.searched_plain
        return self.weight, self.plain, self.projected, *nearest

    @property
    def frobenius(self) -> float:
        """|E|/|W|"""
        return _ratio(self.plain, self.weight, 0.0)

    @property
    def projected_error(self) -> float:
        """|EV|/|W|"""
        return _ratio(self.projected, self.weight, 0.0)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, dB: 20 log10(|W|/|E|); infinite without error."""
        return -20 * math.log10(self.frobenius) if self.frobenius > 0 else math.inf

    @property
    def frobenius_ratio(self) -> float:
        """|E|/|E0|"""
        return _ratio(self.plain, self.nearest_plain, 1.0)

    @property
    def projected_ratio(self) -> float:
        """|EV|/|E0 V|"""
        return _ratio(self.projected, self.nearest_projected, 1.0)


def _ratio(squares: float, of: float, neither: float) -> float:
    if of == 0:
        return neither if squares == 0 else math.inf
    return math.sqrt(squares / of)


def measure(fmt: Format, tensors: Tensors, w: Tensor, rounding: Rounding) -> LayerError:
    """Error of stored tensors against the weight [N,K] or [E,N,K] they were made from."""
    if w.dim() == 2:
        # Before the others are in memory.
        directions = _directions(w, rounding, fmt)
        return _sums(w, *_compared(fmt, tensors, w, rounding), directions)
    compared = _compared(fmt, tensors, w, rounding)
    total = LayerError(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for i in range(w.shape[0]):
        stored, nearest, searched = (one[i] for one in compared)
        total += _sums(w[i], stored, nearest, searched, _directions(w[i], rounding, fmt))
    return total


def _compared(fmt: Format, tensors: Tensors, w: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """What is stored, what round-to-nearest gives, and what the scale search gives, if there is one."""
    shape = tuple(w.shape)
    single = w.float() if w.dtype == torch.float64 else w
    nearest = fmt.dequantize(fmt.quantize(single, None), shape)
    searched = nearest
    if rounding.scale_search and fmt.has_scale_search:
        searched = fmt.dequantize(fmt.quantize(single, rounding.coherence), shape)
    return fmt.dequantize(tensors, shape), nearest, searched


def _directions(w: Tensor, rounding: Rounding, fmt: Format) -> Tensor:
    k = subspace_size(tuple(w.shape), rounding, fmt.top_p)
    largest = w.abs().amax().double().clamp(min=torch.finfo(torch.float64).tiny)
    return leading_directions(w.to(torch.float64, copy=True).div_(largest), k)


def _sums(w: Tensor, stored: Tensor, nearest: Tensor, searched: Tensor, directions: Tensor) -> LayerError:
    total = LayerError(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rows = max(1, CHUNK // w.shape[1])
    for parts in zip(*(matrix.split(rows) for matrix in (w, stored, nearest, searched)), strict=True):
        # FP64 sources are rounded to float32 before they are quantized: that error counts, too.
        exact, *others = (part.double() for part in parts)
        error, error0, error1 = (other - exact for other in others)
        total += LayerError(
            _energy(exact),
            _energy(error),
            _energy(error @ directions),
            _energy(error0),
            _energy(error0 @ directions),
            _energy(error1),
            _outlier(exact, error, torch.maximum(_groups(error0), _groups(error1))),
        )
    return total


def _energy(x: Tensor) -> float:
    return x.square().sum().item()


def _groups(x: Tensor) -> Tensor:
    """Norms of whole groups of :data:`GROUP` neighbours of a row."""
    whole = x.shape[1] // GROUP * GROUP
    return x[:, :whole].unflatten(1, (-1, GROUP)).norm(dim=-1)


def _outlier(w: Tensor, error: Tensor, expected: Tensor) -> float:
    found = _groups(error)
    ratios = torch.where(found > 0, found / torch.maximum(expected, _groups(w) / 10), 0.0)
    return ratios.amax().item() if ratios.numel() else 0.0
