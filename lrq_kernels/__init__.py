"""Kernels for low-precision weights: packing to NVFP4, MXFP8, FP8 and INT8, bit for bit the same from every backend.

Every operation is one function of :mod:`lrq_kernels.ops` (its contract: shapes, units, errors, source) and, from its
first use on, a custom op ``torch.ops.lrq.<name>``. Importing this package does not import torch; using it does.
"""

from __future__ import annotations

import importlib
from typing import Any

OPERATIONS = {
    "amax": "amax",
    "pack_fp4": "fp4",
    "unpack_fp4": "fp4",
    "quantize_nvfp4": "nvfp4",
    "dequantize_nvfp4": "nvfp4",
    "quantize_mxfp8": "mxfp8",
    "dequantize_mxfp8": "mxfp8",
    "quantize_fp8": "fp8",
    "dequantize_fp8": "fp8",
    "quantize_int8": "int8",
    "dequantize_int8": "int8",
    "rotate_hadamard": "hadamard",
    "rounding_step": "rounding_step",
    "swizzle_scales": "swizzle",
    "unswizzle_scales": "swizzle",
}
"""Name of every operation and the module of its contract, the same file name in ``ops``, ``reference``, ``triton``
and ``csrc``."""

_DISPATCH = ("use_backend", "explain", "backends")

__all__ = [*OPERATIONS, *_DISPATCH, "bind"]


def __getattr__(name: str) -> Any:
    if name in OPERATIONS:
        return getattr(importlib.import_module(f"lrq_kernels.ops.{OPERATIONS[name]}"), name)
    if name in _DISPATCH:
        return getattr(importlib.import_module("lrq_kernels.dispatch"), name)
    if name == "bind":
        return importlib.import_module("lrq_kernels.bound").bind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
