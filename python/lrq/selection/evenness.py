"""How a weight's error shows in its outputs, by its singular values alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq.selection.heuristics import PART


def evenness(w: Tensor) -> float:
    """``(Σσ²)² / (m Σσ⁴)`` of a weight [N,K] with m = min(N,K) singular values σ, over all matrices of a bank.

    1 where they are all equal, 1/m where there is but one. Of inputs that lie as the weight's rows do, ``x = W'u`` with
    white u, the outputs are so much larger than those of white inputs where one direction leads, while an error that
    has no direction grows less: relative to the outputs ``|E|²/|W|²`` becomes ``|E|²/|W|²`` times this (K > N: as if
    all of the error lay where the rows do). It is the effective rank over m.
    """
    total = fourth = 0.0
    for matrix in w if w.dim() == 3 else (w,):
        low, high = matrix.aminmax()
        largest = torch.maximum(high, -low).float()
        # Squared twice, the weights themselves could leave float32.
        gram = _gram(matrix, torch.where(largest > 0, largest, 1.0))
        size = largest.item() ** 2
        total += size * gram.diagonal().double().sum().item()
        parts = gram.split(max(1, PART // len(gram)))
        fourth += size**2 * sum(torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2 for part in parts)
    count = w.shape[0] if w.dim() == 3 else 1
    return total**2 / (count * min(w.shape[-2:]) * fourth) if fourth > 0 else 1.0


def _gram(matrix: Tensor, scale: Tensor) -> Tensor:
    """Of the smaller side, float32, of the weight over its scale; so large a part at a time that it takes no memory."""
    rows, columns = matrix.shape
    side = min(rows, columns)
    gram = torch.zeros(side, side, device=matrix.device)
    for part in matrix.split(max(1, PART // side), dim=int(rows < columns)):
        single = part.float() / scale
        gram.addmm_(*((single, single.T) if rows < columns else (single.T, single)))
    return gram
