import math

import torch
from torch import Tensor

from lrq_kernels.dispatch import kernel


def rotate(x: Tensor, group: int) -> Tensor:
    """The butterfly stages of the contract, float32."""
    y = x.float()
    span = 1
    while span < group:
        a, b, c, d = y.unflatten(-1, (-1, 4, span)).unbind(-2)
        s, t, u, v = a + b, a - b, c + d, c - d
        y = torch.stack((s + v, s - v, t + u, u - t), -2).flatten(-3)
        span *= 4
    return y * (1 / math.isqrt(group))


@kernel("rotate_hadamard", backend="reference")
def rotate_hadamard(x: Tensor, group: int, out: Tensor) -> None:
    out.copy_(rotate(x, group))
