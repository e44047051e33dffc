"""The best block scales where inputs count unequally."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq.rounding.problem import Problem

CHUNK = 1 << 20
"""Weights that are tried at a time."""


def weighted_scales(problem: Problem, second: Tensor) -> Tensor:
    """The rung within reach that makes ``Σ_k E[x_k²] E_k²`` least over each block, E that of the nearest codes.

    Args:
        problem: one with a ladder; the search begins at its scales.
        second: float32 [K], E[x²] of the prepared inputs.

    Returns:
        float32 [B,N,blocks]; the first candidate wins a tie.
    """
    ladder, grid, size = problem.ladder, problem.grid, problem.block[1]
    assert ladder is not None
    # The last block may not be whole; what is missing is 0, and so is its error.
    missing = (0, -problem.weight.shape[2] % size)
    second = pad(second, missing).view(-1, size)
    rows = max(1, CHUNK // (problem.weight.shape[0] * problem.weight.shape[2]))
    found = []
    for part, own in zip(problem.weight.split(rows, 1), problem.scale.split(rows, 1), strict=True):
        blocks = pad(part, missing).unflatten(-1, (-1, size))
        best, least = own, torch.full_like(own, torch.inf)
        for candidate in ladder.around(own):
            each = candidate[..., None]
            inverse = torch.where(each > 0, 1 / each, 0.0)
            error = (grid.nearest(blocks * inverse) * each - blocks).square_().mul_(second).sum(-1)
            wins = error < least
            best, least = torch.where(wins, candidate, best), torch.where(wins, error, least)
        found.append(best)
    return torch.cat(found, 1)
