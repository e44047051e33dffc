"""Kernels written in C++ and CUDA (csrc): backends ``cpu`` and ``cuda``."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from lrq_kernels.dispatch import kernel, unavailable

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


@functools.cache
def _device_refusal(index: int) -> str | None:
    return _native.cuda_refusal(index) or None


def _with_contiguous_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _accepts_cpu(x: Tensor, given_scale: Tensor | None = None, *_: object) -> str | None:
    for name, tensor in (("input", x), ("scale", given_scale)):
        if tensor is not None and tensor.device.type != "cpu":
            return f"{name} is on {tensor.device.type}"
    return None


def _accepts_cuda(x: Tensor, given_scale: Tensor | None = None, *_: object) -> str | None:
    if not x.is_cuda:
        return f"input is on {x.device.type}"
    if given_scale is not None and given_scale.device != x.device:
        return f"scale is on {given_scale.device}, input on {x.device}"
    return _device_refusal(x.device.index)


@kernel("quantize_nvfp4", backend="cpu", accepts=_accepts_cpu)
def quantize_nvfp4_cpu(
    x: Tensor,
    given_scale: Tensor | None,
    coherence: float | None,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
) -> None:
    threads = torch.get_num_threads()
    x = _with_contiguous_columns(x)
    _native.quantize_nvfp4_cpu(x, given_scale, coherence, codes, block_scales, tensor_scale, threads)


if _native.has_cuda:

    @kernel("quantize_nvfp4", backend="cuda", accepts=_accepts_cuda)
    def quantize_nvfp4_cuda(
        x: Tensor,
        given_scale: Tensor | None,
        coherence: float | None,
        codes: Tensor,
        block_scales: Tensor,
        tensor_scale: Tensor,
    ) -> None:
        x = _with_contiguous_columns(x)
        amax = torch.zeros_like(tensor_scale) if given_scale is None else None
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _native.quantize_nvfp4_cuda(x, given_scale, amax, coherence, codes, block_scales, tensor_scale, stream)
else:
    unavailable("cuda", "this build has no CUDA part")
