"""Products of 16-bit matrices whose results are float32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
_HAS_WIDE_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None
"""Whether torch multiplies 16 bits into float32."""
LEAST_CAPABILITY = (8, 0)
"""Of a GPU, for bfloat16."""


def has_wide_product(x: Tensor) -> bool:
    """Whether :func:`wide_product` takes matrices as ``x``: of 16 bits, on a GPU that can."""
    if not (_HAS_WIDE_PRODUCTS and x.is_cuda and x.dtype in HALVES):
        return False
    # With these sums torch refuses.
    if x.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
        return False
    return _capability(x.device) >= LEAST_CAPABILITY


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    # Asking takes longer than a launch.
    return torch.cuda.get_device_capability(device)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of 16-bit a [B,M,K] and b [B,K,N], float32 [B,M,N].

    float32 holds the product of two such numbers: exact but for the sums, as products of float32, at many times their
    rate.
    """
    return torch.bmm(a, b, out_dtype=torch.float32)
