"""Kernels written in C++ and CUDA (csrc): backends ``cpu`` and ``cuda``."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from lrq_kernels.dispatch import unavailable

INTERFACE = 1
"""The signatures of csrc/bindings.cpp that this module calls."""

if find_spec("lrq_kernels._native") is None:
    raise ImportError("the native extension is not built (LRQ_NATIVE=off, or no compiler when lrq was installed)")
try:
    from lrq_kernels import _native
except ImportError as error:
    raise ImportError(f"the native extension does not load: {error}") from error
if getattr(_native, "interface", None) != INTERFACE:
    raise ImportError("the native extension is of another version: install lrq again")
if not _native.has_cuda:
    unavailable("cuda", "this build has no CUDA part")
elif not torch.cuda.is_available():
    unavailable("cuda", "no CUDA device")

# They need the extension that was looked for above.
from lrq_kernels.native import amax, fp4, fp8, hadamard, int8, mxfp8, nvfp4, rounding_step, swizzle  # noqa: E402, F401
