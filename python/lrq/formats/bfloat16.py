"""Weights that are not quantized, but stored in 16 bits where they take 32 or 64."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "bfloat16"
"""What a rule says, and what plans call it."""
CODE = "BF16"
"""What a header calls it."""
WIDER = {"F32": torch.float32, "F64": torch.float64}
"""The dtypes that it makes smaller, by their names in a header."""
_BLOCK = 1 << 16
"""Elements that are rounded at a time."""


def rounded(w: Tensor) -> Tensor:
    """The weight in bfloat16: nearest, ties to even, float64 through float32 as in every other format.

    Raises:
        ValueError: a finite weight beyond bfloat16's largest, 3.39e38.
    """
    single = w.float()
    half = single.bfloat16()
    if (torch.isinf(half) & torch.isfinite(w)).any():
        raise ValueError("holds a value beyond bfloat16's largest, 3.39e38")
    return half


def round_in_place(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Round bytes of weights, uint8, within their own memory; what is returned is its beginning.

    Raises:
        ValueError: as :func:`rounded`.
    """
    weights, halves = data.view(dtype), data.view(torch.bfloat16)
    for begin in range(0, weights.numel(), _BLOCK):
        block = weights[begin : begin + _BLOCK]
        # A copy, made before it is written over what was read: it ends where the block does, or before.
        halves[begin : begin + block.numel()] = rounded(block)
    return data[: 2 * weights.numel()]
