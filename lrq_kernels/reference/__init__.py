"""Plain PyTorch kernels: the definition of every result, on any device."""

from lrq_kernels.reference import amax, fp4, fp8, hadamard, int8, mxfp8, nvfp4, rounding_step, swizzle  # noqa: F401
