"""Streams the inputs of a layer into statistics: one pass, memory that does not grow with the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats, in_range, magnitude_counts
from lrq.products import has_wide_product, wide_product

GRAM_LIMIT = 4096
"""Widest layer whose second moments are kept whole: float64 [K,K] while streaming, 128 MiB at the limit."""
RANK = 512
"""Eigenpairs that a wider layer keeps."""
OVERSAMPLING = 64
"""Columns more of the sketch than it gives eigenpairs."""
CHUNK = 1 << 24
"""Elements that are summed at once, and widened to float64; on a GPU, where they are not, twice as many."""


@dataclass(frozen=True)
class Sums:
    """Over some inputs of a layer."""

    count: int
    each: dict[str, Tensor]
    """By name, as :class:`Accumulator` adds them up."""


class Accumulator:
    """Sums over tokens, on the device of the inputs.

    ``K <= gram_limit``: float32 products of a chunk, added up in float64. Wider: the sketch Y = Σ xx'Ω of a fixed
    orthonormal Ω [K, rank + 64], of which :meth:`result` takes the Nyström approximation (Tropp, Yurtsever, Udell,
    Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", algorithm 3).
    ``rank`` 0: the diagonal alone.

    On a GPU, whose memory such sums would keep busy for longer than the model does, those of a chunk are made in
    float32, and products of 16-bit inputs from their 16 bits, which is as exact.
    """

    def __init__(self, columns: int, *, gram_limit: int = GRAM_LIMIT, rank: int = RANK) -> None:
        self.columns, self.count = columns, 0
        self._rank = min(rank, columns)
        self._whole = columns <= gram_limit
        self._totals: dict[str, Tensor] = {}

    @property
    def kind(self) -> tuple[int, bool, int]:
        """Accumulators of one kind make the same sums of the same inputs."""
        return self.columns, self._whole, self._rank

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs [..,K] of any float dtype.

        Args:
            mask: bool [..], the tokens that count; padding does not.

        Raises:
            ValueError: inputs of another width.
        """
        for sums in self.sums_of(x, mask):
            self.add(sums)

    def sums_of(self, x: Tensor, mask: Tensor | None = None) -> Iterator[Sums]:
        """The sums over inputs as those of :meth:`update`, a chunk at a time."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"inputs must have {self.columns} columns, got {x.shape[-1]}")
        rows = x.detach().reshape(-1, self.columns)
        if mask is not None:
            rows = rows[mask.reshape(-1)]
        for chunk in rows.split(max(1, chunk_of(rows) // self.columns)):
            if len(chunk):
                # Sums of 16 bits, as inside autocast, are none.
                with torch.autocast(chunk.device.type, enabled=False):
                    yield Sums(len(chunk), self._sums_of(chunk))

    def add(self, sums: Sums) -> None:
        """Add the sums that an accumulator of the same kind made."""
        self.count += sums.count
        for name, one in sums.each.items():
            total = self._totals.get(name)
            if total is None:
                wide = torch.int64 if not one.is_floating_point() else one.dtype if name == "amax" else torch.float64
                total = self._totals[name] = torch.zeros_like(one, dtype=wide)
            one = one.to(total.device)
            _ = torch.maximum(total, one, out=total) if name == "amax" else total.add_(one)

    def _sums_of(self, x: Tensor) -> dict[str, Tensor]:
        x = working(x)
        if x.is_cuda:
            sums = {"first": x.sum(0, dtype=torch.float32), "second": norm(x, 2, 0).square()}
            sums["amax"] = norm(x, math.inf)
        else:
            wide = x.double()
            sums = {"first": wide.sum(0), "second": wide.square_().sum(0), "amax": x.abs().amax()}
        return sums | {"histogram": magnitude_counts(x)} | self._products_of(x)

    def _products_of(self, x: Tensor) -> dict[str, Tensor]:
        if self._whole:
            return {"gram": _product(x.T, x)}
        return {"sketch": _sketch(x, self._omega(x.device))} if self._rank else {}

    def adopt(self, places: dict[str, Tensor]) -> None:
        """Keep sums in these places from now on; who gave them may add to them, with :meth:`add_products`."""
        for name, place in places.items():
            if name in self._totals:
                place.copy_(self._totals[name])
        self._totals |= places

    def add_products(self, x: Tensor) -> None:
        """Count inputs [n,K] on a GPU, and add what is not in the places that were given."""
        self.add(Sums(len(x), self._products_of(working(x))))

    def _omega(self, device: torch.device) -> Tensor:
        return _test_matrix(self.columns, min(self._rank + OVERSAMPLING, self.columns), device)

    def result(self) -> InputStats | None:
        """On the CPU; None where no token came.

        Raises:
            ValueError: an input was not finite.
        """
        if not self.count:
            return None
        sums = {name: total.cpu() for name, total in self._totals.items()}
        if not all(torch.isfinite(total).all() for total in sums.values() if total.is_floating_point()):
            raise ValueError("an input is NaN or infinite")
        mean = sums["first"] / self.count
        # Of inputs that are nearly constant, rounding may leave less.
        second = torch.maximum(sums["second"] / self.count, mean.square())
        diagonal = InputStats(self.count, mean, second, sums["amax"].item(), in_range(sums["histogram"]))
        if "gram" in sums:
            gram = sums["gram"] / self.count
            return replace(diagonal, gram=((gram + gram.T) / 2).float())
        if "sketch" not in sums:
            return diagonal
        omega = self._omega(torch.device("cpu")).double()
        vectors, values = _nystrom(sums["sketch"] / self.count, omega, self._rank)
        return replace(diagonal, vectors=vectors, values=values)


def chunk_of(x: Tensor) -> int:
    """Elements that are summed at once, where x is."""
    return 2 * CHUNK if x.is_cuda else CHUNK


def working(x: Tensor) -> Tensor:
    """16 bits where their products are fast, else float32."""
    return x if has_wide_product(x) else x.float()


def norm(x: Tensor, order: float, dim: int | None = None) -> Tensor:
    """Float32, in one pass over numbers of any dtype."""
    return torch.linalg.vector_norm(x, order, dim, dtype=torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return wide_product(a[None], b[None])[0] if has_wide_product(a) else a @ b


@lru_cache(maxsize=16)
def _test_matrix(columns: int, width: int, device: torch.device) -> Tensor:
    """Ω, near to orthonormal columns, which bfloat16 holds."""
    if device.type != "cpu":
        return _test_matrix(columns, width, torch.device("cpu")).to(device)
    generator = torch.Generator().manual_seed(columns)
    return torch.linalg.qr(torch.randn(columns, width, generator=generator, dtype=torch.float32))[0].bfloat16()


def _sketch(x: Tensor, omega: Tensor) -> Tensor:
    """``x'(xΩ)``, float32."""
    if x.dtype != omega.dtype:
        x = x.float()
        return x.T @ (x @ omega.float())
    y = _product(x, omega)
    # In two parts 16 bits hold it as well as sums of float32 do.
    high = y.bfloat16()
    return _product(x.T, high) + _product(x.T, (y - high).bfloat16())


def _nystrom(sketch: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs float32 [K,r], [r] of a positive semidefinite A, given AΩ."""
    # A shift keeps the small matrix positive definite; the eigenvalues are moved back.
    shift = torch.finfo(torch.float32).eps * sketch.norm() + torch.finfo(torch.float64).tiny
    shifted = sketch + shift * omega
    small = omega.T @ shifted
    values, basis = torch.linalg.eigh((small + small.T) / 2)
    root = shifted @ (basis / values.clamp(min=shift).sqrt())
    vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    kept = (singular.square() - shift).clamp(min=0)[:rank]
    return vectors[:, :rank].float().contiguous(), kept.float()
