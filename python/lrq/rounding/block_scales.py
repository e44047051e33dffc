"""The scales that a block may take, and the best of them where inputs count unequally."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq.formats.grid import Grid

CHUNK = 1 << 20
"""Weights that are tried at a time."""


@dataclass(frozen=True)
class Ladder:
    """The scales that blocks of a matrix can take."""

    rungs: Tensor
    """float32 [B,L], rising, in the units of the weight; the first is 0, that of a block of zeros."""
    reach: range
    """Rungs that are tried, counted from the block's own."""

    def index(self, scale: Tensor) -> Tensor:
        """int64 of scales [B,..] that are rungs."""
        return torch.searchsorted(self.rungs, scale.flatten(1).contiguous()).view(scale.shape)

    def around(self, scale: Tensor) -> Tensor:
        """The candidates [C,B,N,blocks] of blocks whose scales [B,N,blocks] are rungs; 0 stays 0."""
        steps = torch.tensor(list(self.reach), device=scale.device).view(-1, 1, 1, 1)
        index = (self.index(scale) + steps).clamp(1, self.rungs.shape[1] - 1)
        spread = self.rungs.expand(len(self.reach), -1, -1)
        found = spread.gather(2, index.flatten(2)).view(index.shape)
        return torch.where(scale > 0, found, 0.0)

    def select(self, index: Tensor) -> Ladder:
        """That of some matrices of the batch."""
        return replace(self, rungs=self.rungs[index])


def weighted_scales(weight: Tensor, scale: Tensor, ladder: Ladder, second: Tensor, grid: Grid) -> Tensor:
    """The rung within reach that makes ``Σ_k E[x_k²] E_k²`` least over each block, E that of the nearest codes.

    Args:
        weight: float32 [B,N,K].
        scale: float32 [B,N,blocks], where the search begins.
        second: float32 [K], E[x²] of the prepared inputs.

    Returns:
        float32 [B,N,blocks]; the first candidate wins a tie.
    """
    size = -(-weight.shape[2] // scale.shape[2])
    # The last block may not be whole; what is missing is 0, and so is its error.
    missing = (0, scale.shape[2] * size - weight.shape[2])
    second = pad(second, missing).view(-1, size)
    rows = max(1, CHUNK // (weight.shape[0] * weight.shape[2]))
    found = []
    for part, own in zip(weight.split(rows, 1), scale.split(rows, 1), strict=True):
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
