"""Triton kernels: one source for every NVIDIA GPU, and for the CPU under ``TRITON_INTERPRET=1``."""

import torch

from lrq_kernels.dispatch import unavailable
from lrq_kernels.triton import amax, fp4, fp8, hadamard, int8, mxfp8, nvfp4, rounding_step, swizzle  # noqa: F401
from lrq_kernels.triton.launch import INTERPRETED

if not torch.cuda.is_available() and not INTERPRETED:
    unavailable("triton", "no CUDA device")
