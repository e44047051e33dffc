"""What error counts: ``f(E) = |U'EV|^2 + λ|E|^2`` for the error E = Ŵ − W of the codes on the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sum_of_squares(x: Tensor) -> float:
    """Sum of the squares of x [N,K] in float64, a part of x at a time."""
    rows = max(1, (1 << 20) // x.shape[1])
    return sum(part.double().square().sum().item() for part in x.split(rows))


@dataclass(frozen=True)
class Metric:
    """A quadratic form over errors [N,K]; smaller is better."""

    right: Tensor
    """V, float32 [K,k], orthogonal columns: the input directions that count more, as long as they count."""
    plain_weight: float
    """λ, the weight of the plain error |E|^2."""
    left: Tensor | None = None
    """U, float32 [N,k'], orthonormal columns; None: the identity, every output counts."""

    def project_block(self, error: Tensor, columns: slice) -> Tensor:
        """The part of ``U'EV`` that an error [N,columns] contributes."""
        inner = error @ self.right[columns]
        return inner if self.left is None else self.left.mT @ inner


def leading_directions(w: Tensor, count: int) -> Tensor:
    """The ``count`` leading right singular vectors of w [N,K], as columns, in w's dtype (float32 or float64)."""
    return leading_subspace(w, count)[0]


def leading_subspace(w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` leading right singular vectors of w [N,K], as columns, and their singular values, rising.

    By the eigenvectors of the Gram matrix of the smaller side: exact, unlike a range finder, which misses a part of
    the subspace of heavy-tailed weights.
    """
    rows, columns = w.shape
    squares, vectors = torch.linalg.eigh(w.mT @ w if columns <= rows else w @ w.mT)
    values, vectors = squares[-count:].clamp(min=0).sqrt(), vectors[:, -count:].contiguous()
    if columns > rows:
        # W'u has length σ: QR makes the directions of tiny σ, whose lengths are noise, orthonormal as well.
        vectors = torch.linalg.qr(w.mT @ vectors).Q
    return vectors, values


def subspace_size(shape: tuple[int, ...], top_p: float, min_k: int, max_k: int) -> int:
    """k = clamp(top_p·min(N,K), min_k, max_k), never more than the smaller side."""
    smaller = min(shape[-2:])
    return max(1, min(max(int(top_p * smaller), min_k), max_k, smaller))


def input_metric(w: Tensor, top_p: float, min_k: int, max_k: int, plain_weight: float, spectrum: float) -> Metric:
    """The default metric of a weight [N,K]: its own leading input directions, every output.

    A direction of singular value σ counts as ``σ^spectrum``, scaled so that the mean square of these weights is 1.
    """
    k = subspace_size(tuple(w.shape), top_p, min_k, max_k)
    largest = w.aminmax()
    unit = torch.maximum(largest.max, -largest.min)
    # The subspace does not depend on the weight's unit, the float32 range of its Gram matrix does.
    directions, values = leading_subspace(w / torch.where(unit > 0, unit, 1.0), k)
    weights = values.pow(spectrum)
    norm = weights.square().mean().sqrt()
    return Metric(directions * torch.where(norm > 0, weights / norm, 1.0), plain_weight)
