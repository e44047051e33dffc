"""Error of a stored layer against its source, and against round-to-nearest with amax scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import Format, Tensors
from lrq.rounding.metric import leading_directions, subspace_size


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

    def __add__(self, other: LayerError) -> LayerError:
        return LayerError(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def _sums(self) -> tuple[float, ...]:
        return self.weight, self.plain, self.projected, self.nearest_plain, self.nearest_projected

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
    shape = tuple(w.shape)
    # FP64 sources are rounded to float32 before they are quantized: that error counts, too.
    exact = w.double()
    stored = fmt.dequantize(tensors, shape).double() - exact
    nearest = fmt.dequantize(fmt.quantize(w.float() if w.dtype == torch.float64 else w, None), shape).double() - exact
    matrices = [(exact, stored, nearest)] if len(shape) == 2 else list(zip(exact, stored, nearest, strict=True))
    total = LayerError(0.0, 0.0, 0.0, 0.0, 0.0)
    for one, error, error0 in matrices:
        k = subspace_size(tuple(one.shape), rounding.top_p, rounding.min_k, rounding.max_k)
        directions = leading_directions(one / one.abs().amax().clamp(min=torch.finfo(torch.float64).tiny), k)
        sums = [one, error, error @ directions, error0, error0 @ directions]
        total += LayerError(*(s.square().sum().item() for s in sums))
    return total
