"""What error counts: ``f(E) = |U'EV|^2 + λ|E|^2`` for the error E = Ŵ − W of the codes on the grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq.config import Rounding
from lrq.formats import Format
from lrq.products import has_wide_product, wide_product

ALIGNMENT = 64
"""A GPU gets zero directions up to a multiple of this: products of rows that no 16 bytes divide are slow."""
LEAST_VALUE = 1e-2
"""Singular values below this share of the largest may leave too few digits to a direction of the other side."""


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of the squares of every matrix of x [B,N,K], float64 [B], a part of x at a time."""
    rows = max(1, (1 << (22 if x.is_cuda else 20)) // max(1, x.shape[0] * x.shape[2]))
    total = x.new_zeros(len(x), dtype=torch.float64)
    for part in x.split(rows, 1):
        total += torch.linalg.vector_norm(part.double(), dim=(1, 2)).square()
    return total


@dataclass(frozen=True)
class Metric:
    """A quadratic form over errors [B,N,K], one for each matrix; smaller is better."""

    right: Tensor
    """V, [B,K,k], orthogonal columns: the input directions that count more, as long as they count."""
    plain_weight: Tensor
    """λ, the weight of the plain error |E|^2, float32 [B]."""
    left: Tensor | None = None
    """U, [B,N,k'], orthonormal columns; None: the identity, every output counts."""
    order: Tensor | None = None
    """int64 [K]: V's rows in this order are an upper triangular matrix, the same of all matrices; None: it has none."""
    limits_plain: bool = True
    """Whether |E| must stay near that of the nearest codes. What the weight tells of its inputs is a guess, and a limit
    keeps it in check. Measured inputs are no guess: the error goes where they are small, and |E| rises as it should,
    to about 1.2 times that of the nearest codes."""

    def project(self, error: Tensor) -> Tensor:
        """``U'EV``."""
        inner = torch.bmm(error, self.right)
        return inner if self.left is None else torch.bmm(self.left.mT, inner)

    def project_block(self, error: Tensor, columns: slice) -> Tensor:
        """The part of ``U'EV`` that an error [B,N,columns] contributes."""
        inner = error @ self.right[:, columns]
        return inner if self.left is None else self.left.mT @ inner

    def gradient(self, projected: Tensor) -> Tensor:
        """``UPV'`` of P = U'EV: half the gradient of |U'EV|^2."""
        outer = projected if self.left is None else torch.bmm(self.left, projected)
        return torch.bmm(outer, self.right.mT)

    def curvature(self) -> tuple[Tensor | None, Tensor]:
        """diag(UU') [B,N], None where U is the identity, and diag(VV') [B,K], float32."""
        row = None if self.left is None else self.left.float().square().sum(-1)
        return row, self.right.float().square().sum(-1)

    def to(self, dtype: torch.dtype) -> Metric:
        """The same with directions of another dtype."""
        left = None if self.left is None else self.left.to(dtype)
        # Of all matrices the same: one is enough in memory.
        same = len(self.right) > 1 and self.right.stride(0) == 0
        right = self.right[:1].to(dtype).expand_as(self.right) if same else self.right.to(dtype)
        return replace(self, right=right, left=left)

    def select(self, index: Tensor) -> Metric:
        """That of some matrices of the batch."""
        left = None if self.left is None else self.left[index]
        right = self.right[:1].expand(len(index), -1, -1) if self.order is not None else self.right[index]
        return replace(self, right=right, plain_weight=self.plain_weight[index], left=left)


def aligned(directions: Tensor) -> Tensor:
    """Directions [..,k] with columns of zeros up to :data:`ALIGNMENT`, on a GPU."""
    return pad(directions, (0, -directions.shape[-1] % ALIGNMENT)) if directions.is_cuda else directions


def leading_directions(w: Tensor, count: int) -> Tensor:
    """The ``count`` leading right singular vectors of w [..,N,K], as columns, in w's dtype (float32 or float64)."""
    return leading_subspace(w, count)[0]


def leading_subspace(w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` leading right singular vectors of w [..,N,K], as columns, and their singular values, rising.

    By the eigenvectors of the Gram matrix of the smaller side: exact, unlike a range finder, which misses a part of
    the subspace of heavy-tailed weights.
    """
    left, right, values = _leading(w, count)
    if right is None:
        assert left is not None
        right = _other_side(w.mT, left, values)
    return right, values


def leading_subspaces(w: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same on both sides: left [..,N,count] and right [..,K,count] singular vectors, and the singular values."""
    left, right, values = _leading(w, count)
    if right is None:
        assert left is not None
        return left, _other_side(w.mT, left, values), values
    return _other_side(w, right, values), right, values


def _leading(w: Tensor, count: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    rows, columns = w.shape[-2:]
    tall = columns <= rows
    squares, vectors = torch.linalg.eigh(gram(w if tall else w.mT))
    values, vectors = squares[..., -count:].clamp(min=0).sqrt(), vectors[..., -count:].contiguous()
    return (None, vectors, values) if tall else (vectors, None, values)


def gram(w: Tensor) -> Tensor:
    """``W'W`` of w [..,N,K], in w's dtype.

    On a GPU, weights that bfloat16 holds take its products: exact but for the sums, as in float32.
    """
    if w.is_cuda and w.dtype == torch.float32:
        half = w.bfloat16()
        if has_wide_product(half) and torch.equal(half.float(), w):
            batch = half.reshape(-1, *w.shape[-2:])
            return wide_product(batch.mT, batch).view(*w.shape[:-2], *2 * w.shape[-1:])
    return w.mT @ w


def _other_side(w: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    # W'u has length σ and is orthogonal to the others but for noise, which one step of Cholesky QR takes away by
    # products alone. Where σ is tiny only noise is left: there Householder's QR makes directions of it.
    across = w @ vectors
    if not bool((values > LEAST_VALUE * values.amax(-1, keepdim=True)).all()):
        return torch.linalg.qr(across).Q
    across = across / values[..., None, :]
    factor = torch.linalg.cholesky(across.mT @ across)
    return torch.linalg.solve_triangular(factor.mT, across, upper=True, left=False)


def subspace_size(shape: tuple[int, ...], rounding: Rounding, top_p: float) -> int:
    """k = clamp(top_p·min(N,K), min_k, max_k), never more than the smaller side; this ``top_p`` if none was asked."""
    smaller, share = min(shape[-2:]), top_p if rounding.top_p is None else rounding.top_p
    return max(1, min(max(int(share * smaller), rounding.min_k), rounding.max_k, smaller))


def plain_metric(count: int, like: Tensor) -> Metric:
    """``|E|^2`` for ``count`` matrices with as many columns as ``like`` [K]."""
    return Metric(like.new_zeros(count, len(like), 0), like.new_ones(count))


def weight_metric(w: Tensor, rounding: Rounding, fmt: Format) -> Metric:
    """The metric of weights [B,N,K] by their own leading directions; ``rounding.projection`` names the sides.

    The largest weight is near 1, for the float32 range of the Gram matrix. An input direction of singular value σ
    counts as ``σ^spectrum``, scaled so that the mean square of these is 1. What ``rounding`` leaves open is the
    format's to say; with both sides directions count alike.
    """
    k = subspace_size(tuple(w.shape), rounding, fmt.top_p)
    left = None
    if rounding.projection == "both":
        left, right, values = leading_subspaces(w, k)
    else:
        right, values = leading_subspace(w, k)
    power = rounding.spectrum if rounding.spectrum is not None else 0.0 if left is not None else fmt.spectrum
    weights = values.pow(power)[:, None]
    norm = weights.square().mean(-1, keepdim=True).sqrt()
    plain = fmt.plain_weight if rounding.plain_weight is None else rounding.plain_weight
    right = aligned(right * torch.where(norm > 0, weights / norm, 1.0))
    return Metric(right, torch.full((len(w),), float(plain), device=w.device), None if left is None else aligned(left))
