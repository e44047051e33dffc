"""The scales that a block may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ladder:
    """The scales that blocks of a matrix can take."""

    rungs: Tensor
    """float32 [B,L], rising, in the units of the weight; the first is 0, that of a block of zeros."""
    reach: range
    """Rungs that are tried, counted from the block's own."""
    fine: bool
    """Whether they are so close that a solver gains by choosing among them itself."""

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
