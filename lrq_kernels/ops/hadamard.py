"""Grouped Hadamard rotation (ConvRot)."""

import torch
from torch import Tensor

from lrq_kernels.contract import check_matrix, operation


def check_group(group: int, columns: int) -> None:
    """Raise ``ValueError`` unless ``group`` is a power of 4 (at least 4) that divides ``columns``."""
    if group < 4 or group & (group - 1) or group.bit_length() % 2 == 0:
        raise ValueError(f"group must be a power of 4 (4, 16, 64, ...), got {group}")
    if columns % group:
        raise ValueError(f"the columns must be a multiple of the Hadamard group {group}, got {columns}")


@operation
def rotate_hadamard(x: Tensor, group: int) -> Tensor:
    """Rotate every group of columns by the regular Hadamard matrix; the rotation is its own inverse.

    H is the Kronecker power of ``[[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]]``, divided by sqrt(group): symmetric
    and orthogonal, H·H = I. Computed in float32 as log4(group) butterfly stages, the innermost columns first, then one
    exact division by a power of two: the bits do not depend on the backend.

    Args:
        x: [M,N] or [B,M,N], float32, bfloat16 or float16.
        group: a power of 4 that divides N.

    Returns:
        float32, the shape of x.

    Equivalent to (up to the order of the additions)::

        (x.float().unflatten(-1, (-1, group)) @ H.T).flatten(-2)
    """
    check_matrix("x", x)
    check_group(group, x.shape[-1])
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
