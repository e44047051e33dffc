"""Where the tensors of a call lie, whether Triton can work on them there, and in which tiles."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lrq_kernels.contract import width
from lrq_kernels.triton.arithmetic import widen

INTERPRETED = not isinstance(widen, triton.JITFunction)
"""``TRITON_INTERPRET=1`` was set when this module was imported."""

MOST_PROGRAMS = 2**31 - 1
_MOST_LONG = 2**31 - 2**16
"""Rows and columns are counted in 32 bits, those of the last tile as well."""
_MOST_MATRICES = 65535
_MERGED = 4096


def size_refusal(rows: int, columns: int) -> str | None:
    """None, or why a matrix is too large."""
    most = max(rows, columns) > _MOST_LONG
    return f"at most {_MOST_LONG} rows and columns, got {rows} x {columns}" if most else None


def refusal(*inputs: object) -> str | None:
    """None, or why Triton can't take these tensors, of which the first is [..,M,N]."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    first = tensors[0]
    too_long = size_refusal(*first.shape[-2:])
    if too_long is not None:
        return too_long
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


def dense(x: Tensor, size: int = 1) -> Tensor:
    """``x``, or a copy of it where it has gaps, or can't be seen as words of ``size`` bytes from its start on."""
    x = x.detach().contiguous()
    starts = x.data_ptr(), x.storage_offset() * x.element_size()
    return x.clone() if any(start % size for start in starts) else x


def merged(matrices: Tensor, multiple: int = 1) -> Tensor:
    """Contiguous matrices [B,M,N] as rows of a length that tiles well and that ``multiple`` divides, if one does."""
    batch, rows, columns = matrices.shape
    length = math.gcd(rows * columns, max(_MERGED, multiple))
    whole = rows == 1 or matrices.stride(1) == columns
    return matrices.view(batch, -1, length) if whole and length >= 256 and length % multiple == 0 else matrices


@dataclass(frozen=True)
class Tile:
    """So many rows and columns to a program, powers of two."""

    rows: int
    columns: int

    def across(self, x: Tensor) -> int:
        return triton.cdiv(x.shape[-1], self.columns)

    def programs(self, x: Tensor) -> int:
        return triton.cdiv(x.shape[-2], self.rows) * self.across(x)


def tile_of(x: Tensor, weights: int, least: int = 16) -> Tile:
    """The tile for [..,M,N], of at most so many weights."""
    columns = width(x.shape[-1], weights, least)
    return Tile(min(weights // columns, triton.next_power_of_2(x.shape[-2])), columns)


def warps_of(weights: int, held: int, most: int = 8) -> int:
    """How many warps hold so many weights, each thread ``held`` of them."""
    return min(max(triton.next_power_of_2(weights // (32 * held)), 1), most)
