"""Triton kernels: one source for every NVIDIA GPU, and for the CPU under ``TRITON_INTERPRET=1``."""

from lrq_kernels.triton import nvfp4  # noqa: F401
