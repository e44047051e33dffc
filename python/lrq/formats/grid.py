"""The values a code can take, in units of its scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.minifloat import encode_e4m3, nearest_e2m1
from lrq_kernels.ops.rounding_step import GRIDS


@dataclass(frozen=True)
class Grid:
    """A finite set of numbers; ``nearest(y)`` is the closest one, ties to even, saturating, float32."""

    name: str
    largest: float
    nearest: Callable[[Tensor], Tensor]
    members: tuple[float, ...] | None = None
    """Those that are not negative, rising, where they are few; the grid is symmetric."""

    def gap(self, y: Tensor) -> Tensor:
        """Distance of the two grid values around y, float32."""
        spacing = GRIDS[self.name.lower()]
        # The exponent of zero is that of 1/2 to frexp.
        least = 2.0**spacing.exponent
        exponent = torch.frexp(y.abs().clamp(min=least)).exponent - 1
        return torch.ldexp(torch.ones_like(y), exponent - spacing.mantissa)

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """``nearest`` with the fewest kernels, for loops over small tensors: the sign of zero may differ."""
        if self.members is None:
            return self.nearest
        values = torch.tensor([*(-v for v in reversed(self.members[1:])), *self.members])
        middle = (values[1:] + values[:-1]) / 2
        # A tie goes to the lower value, unless the border is just below it.
        border = torch.where(self.nearest(middle) > middle, middle.nextafter(middle - 1), middle).to(device)
        values = values.to(device)
        return lambda y: values[torch.bucketize(y, border)]


E2M1 = Grid("E2M1", 6.0, nearest_e2m1, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E4M3 = Grid("E4M3", 448.0, lambda y: encode_e4m3(y).float())
INT8 = Grid("INT8", 127.0, lambda y: y.round().clamp(-127, 127))
