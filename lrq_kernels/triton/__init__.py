"""Triton kernels: one source for every NVIDIA GPU, and for the CPU under ``TRITON_INTERPRET=1``."""

import torch

from lrq_kernels.dispatch import unavailable
from lrq_kernels.triton import nvfp4

if not torch.cuda.is_available() and not nvfp4.INTERPRETED:
    unavailable("triton", "no CUDA device")
