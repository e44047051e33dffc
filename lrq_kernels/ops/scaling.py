"""How many weights share one float32 scale: the matrix, a row, or a square block."""

import torch
from torch import Tensor

from lrq_kernels.contract import check_device, check_shape, check_tensor

SCALINGS = ("tensor", "row", "block")


def scale_shape(shape: torch.Size, scaling: str, block: int, row_tail: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a [..,M,N] matrix; ``row_tail`` is what follows M for one scale a row: () or (1,).

    Raises:
        ValueError: unknown scaling, or a block that is not positive or does not divide M and N.
    """
    *batch, rows, columns = shape
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    if scaling == "tensor":
        return tuple(batch)
    if scaling == "row":
        return (*batch, rows, *row_tail)
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    if rows % block or columns % block:
        raise ValueError(f"M and N must be multiples of the block {block}, got {rows} x {columns}")
    return (*batch, rows // block, columns // block)


def check_given_scale(scale: Tensor | None, scaling: str, x: Tensor) -> None:
    """A scale can be given for the whole matrix only."""
    if scale is None:
        return
    if scaling != "tensor":
        raise ValueError(f"scale can be given with scaling 'tensor' only, not {scaling!r}")
    check_shape("scale", scale, tuple(x.shape[:-2]), torch.float32)
    check_device("scale", scale, x)


def expand_scale(scale: Tensor, shape: torch.Size) -> Tensor:
    """A view or copy of ``scale`` that broadcasts against codes of ``shape`` [..,M,N].

    Scales are [..] (tensor), [..,M] or [..,M,1] (row), or [..,M/b,N/b] (block).
    """
    batch, rows = len(shape) - 2, shape[-2]
    if scale.dim() == batch:
        return scale[..., None, None]
    if scale.dim() == batch + 1:
        return scale[..., None]
    if scale.shape[-2] == rows and scale.shape[-1] == 1:
        return scale
    block = rows // scale.shape[-2]
    return scale.repeat_interleave(block, -2).repeat_interleave(block, -1)


def check_scale_of(scale: Tensor, codes: Tensor, row_tail: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``scale`` is float32, beside the codes, and fits them by tensor, row or block."""
    check_tensor("scale", scale)
    check_device("scale", scale, codes)
    shape = codes.shape
    *batch, rows, columns = shape
    fits = tuple(scale.shape) in (tuple(batch), (*batch, rows, *row_tail))
    if not fits and scale.dim() == len(shape) and list(scale.shape[:-2]) == list(batch) and 0 not in scale.shape:
        block = rows // scale.shape[-2]
        fits = block > 0 and (scale.shape[-2] * block, scale.shape[-1] * block) == (rows, columns)
    if not fits or scale.dtype != torch.float32:
        given = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"scale: float32 by tensor, row or square block of codes {list(shape)}, got {given}")
