"""Where the memory of a call lies, and whether a native kernel can work on it there."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrq_kernels import _native


@functools.cache
def _device_refusal(index: int) -> str | None:
    return _native.cuda_refusal(index) or None


def with_contiguous_columns(x: Tensor) -> Tensor:
    """``x``, or a copy of it where neighbours of a row are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_cpu(*inputs: object) -> str | None:
    """None, or which of the tensors is elsewhere."""
    for x in inputs:
        if isinstance(x, Tensor) and x.device.type != "cpu":
            return f"takes tensors on the CPU, got one on {x.device.type}"
    return None


def on_cuda(*inputs: object) -> str | None:
    """None, or why the CUDA kernels can't take these tensors."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    for x in tensors:
        if not x.is_cuda:
            return f"takes tensors on CUDA, got one on {x.device.type}"
        if x.device != tensors[0].device:
            return f"takes tensors on one device, got {tensors[0].device} and {x.device}"
    return _device_refusal(tensors[0].device.index)


_LARGEST_GROUP = 1024
"""Of ``with_group`` in csrc/cuda/hadamard.h."""
_MOST_VECTORS = 2**31 - 2**21
"""Vectors of 8 columns are counted in 32 bits, those of the last thread blocks as well."""


def group_refusal(group: int) -> str | None:
    """None, or why the CUDA kernels can't rotate groups of so many columns."""
    return f"the Hadamard group must be at most {_LARGEST_GROUP}, got {group}" if group > _LARGEST_GROUP else None


def size_refusal(x: Tensor) -> str | None:
    """None, or why a kernel that numbers the vectors of a matrix can't take it."""
    rows, columns = x.shape[-2:]
    large = rows * ((columns + 7) // 8) > _MOST_VECTORS
    return f"matrix too large for one launch: {[rows, columns]}" if large else None


_MOST_PARTS = 256
"""``kMostParts`` of csrc/cuda/amax.h."""


def room_for_amax(x: Tensor) -> Tensor:
    """Memory in which thread blocks tell what they found in their parts of the matrices of ``x``."""
    return x.new_empty(max(_MOST_PARTS, x.shape[:-2].numel()), dtype=torch.float32)


def stream_of(x: Tensor) -> int:
    """The current CUDA stream on the device of ``x``."""
    # What torch.cuda.current_stream(x.device).cuda_stream is, without making an object for it.
    return torch._C._cuda_getCurrentRawStream(x.get_device())
