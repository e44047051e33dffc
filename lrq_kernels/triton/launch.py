"""Where the tensors of a call lie, and whether Triton can work on them there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from lrq_kernels.triton.arithmetic import widen

INTERPRETED = not isinstance(widen, triton.JITFunction)
"""``TRITON_INTERPRET=1`` was set when this module was imported."""

MOST_PROGRAMS = 2**31 - 1
_MOST_MATRICES = 65535


def refusal(*inputs: object) -> str | None:
    """None, or why Triton can't take these tensors, of which the first is [..,M,N]."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    first = tensors[0]
    for x in tensors:
        if x.device.type not in ("cuda", "cpu"):
            return f"takes CUDA tensors, got one on {x.device}"
        if x.device.type == "cpu" and not INTERPRETED:
            return "takes CPU tensors only if TRITON_INTERPRET=1 was set before it was imported"
        if x.device != first.device:
            return f"takes tensors on one device, got {first.device} and {x.device}"
    if first.shape[:-2].numel() > _MOST_MATRICES:
        return f"at most {_MOST_MATRICES} matrices, got {first.shape[0]}"
    return _cuda_refusal(first) if first.is_cuda else None


def _cuda_refusal(x: Tensor) -> str | None:
    if torch.version.hip is not None:
        return "ROCm is not supported"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None


def accepts(programs: Callable[..., int]) -> Callable[..., str | None]:
    """As `refusal`, and how many programs a matrix takes, given the inputs, must fit into a launch."""

    def reason(*inputs: object) -> str | None:
        found = refusal(*inputs)
        if found is None and programs(*inputs) > MOST_PROGRAMS:
            assert isinstance(inputs[0], Tensor)
            found = f"matrix too large for one launch: {list(inputs[0].shape[-2:])}"
        return found

    return reason


def has_e4m3(x: Tensor) -> bool:
    """Whether the GPU converts E4M3."""
    return x.is_cuda and not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (8, 9)


def current(x: Tensor) -> contextlib.AbstractContextManager:
    """Inside it kernels run on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def matrices_of(x: Tensor) -> Tensor:
    """``x``, or a copy of it where neighbours of a row are apart, as [B,M,N]."""
    x = x.detach()
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x[None]
