"""Streams the inputs of a layer into statistics: one pass, memory that does not grow with the tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lrq.calibration.inputs import BINS, InputStats, magnitude_bins

GRAM_LIMIT = 4096
"""Widest layer whose second moments are kept whole: float64 [K,K] while streaming, 128 MiB at the limit."""
RANK = 512
"""Eigenpairs that a wider layer keeps."""
OVERSAMPLING = 64
"""Columns more of the sketch than it gives eigenpairs."""
CHUNK = 1 << 24
"""Elements widened to float64 at once."""


class Accumulator:
    """Sums over tokens, on the device of the inputs.

    ``K <= gram_limit``: float32 products of a chunk, added up in float64. Wider: the sketch Y = Σ xx'Ω of a fixed
    orthonormal Ω [K, rank + 64], of which :meth:`result` takes the Nyström approximation (Tropp, Yurtsever, Udell,
    Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", algorithm 3).
    ``rank`` 0: the diagonal alone.
    """

    def __init__(self, columns: int, *, gram_limit: int = GRAM_LIMIT, rank: int = RANK) -> None:
        self.columns, self.count, self.skipped = columns, 0, 0
        self._rank = min(rank, columns)
        self._whole = columns <= gram_limit
        self._sums: dict[str, Tensor] = {}
        self._omega: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs [..,K] of any float dtype.

        Args:
            mask: bool [..], the tokens that count; padding does not.

        Raises:
            ValueError: inputs of another width.
        """
        if x.shape[-1] != self.columns:
            raise ValueError(f"inputs must have {self.columns} columns, got {x.shape[-1]}")
        rows = x.detach().reshape(-1, self.columns)
        if mask is not None:
            rows = rows[mask.reshape(-1)]
        for chunk in rows.split(max(1, CHUNK // self.columns)):
            if len(chunk):
                # Sums of 16 bits, as inside autocast, are none.
                with torch.autocast(chunk.device.type, enabled=False):
                    self._add(chunk.float())

    def _add(self, x: Tensor) -> None:
        sums = self._sums or self._begin(x.device)
        x = x.to(sums["first"].device)
        wide = x.double()
        self.count += len(x)
        sums["first"] += wide.sum(0)
        sums["second"] += wide.square_().sum(0)
        torch.maximum(sums["amax"], x.abs().amax(), out=sums["amax"])
        sums["histogram"] += magnitude_bins(x)
        if self._whole:
            sums["gram"] += x.T @ x
        elif self._omega is not None:
            sums["sketch"] += x.T @ (x @ self._omega)

    def _begin(self, device: torch.device) -> dict[str, Tensor]:
        self._sums = {
            "first": torch.zeros(self.columns, dtype=torch.float64, device=device),
            "second": torch.zeros(self.columns, dtype=torch.float64, device=device),
            "amax": torch.zeros((), device=device),
            "histogram": torch.zeros(BINS, dtype=torch.int64, device=device),
        }
        if self._whole:
            self._sums["gram"] = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=device)
        elif self._rank:
            width = min(self._rank + OVERSAMPLING, self.columns)
            generator = torch.Generator().manual_seed(self.columns)
            self._omega = torch.linalg.qr(torch.randn(self.columns, width, generator=generator))[0].to(device)
            self._sums["sketch"] = torch.zeros(self.columns, width, dtype=torch.float64, device=device)
        return self._sums

    def result(self) -> InputStats | None:
        """On the CPU; None where no token came.

        Raises:
            ValueError: an input was not finite.
        """
        if not self.count:
            return None
        sums = {name: total.cpu() for name, total in self._sums.items()}
        if not all(torch.isfinite(total).all() for total in sums.values() if total.is_floating_point()):
            raise ValueError("an input is NaN or infinite")
        mean, second = sums["first"] / self.count, sums["second"] / self.count
        diagonal = InputStats(self.count, mean, second, sums["amax"].item(), sums["histogram"])
        if "gram" in sums:
            gram = sums["gram"] / self.count
            return replace(diagonal, gram=((gram + gram.T) / 2).float())
        if self._omega is None:
            return diagonal
        vectors, values = _nystrom(sums["sketch"] / self.count, self._omega.cpu().double(), self._rank)
        return replace(diagonal, vectors=vectors, values=values)


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
