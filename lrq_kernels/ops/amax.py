"""Largest magnitude of a matrix."""

import torch
from torch import Tensor

from lrq_kernels.contract import check_matrix, operation


@operation
def amax(x: Tensor) -> Tensor:
    """Largest magnitude of every matrix.

    Args:
        x: [M,N] or [B,M,N], float32, bfloat16 or float16.

    Returns:
        float32, [] or [B]. NaN if a matrix holds a NaN.

    Equivalent to::

        x.abs().amax((-2, -1)).float()
    """
    check_matrix("x", x)
    return x.new_empty(x.shape[:-2], dtype=torch.float32)
