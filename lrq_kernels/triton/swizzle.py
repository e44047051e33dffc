"""The tiles of block scales in Triton: four scales of a row at once where rows are words, else one by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.launch import accepts, current, matrices_of

_ASIDE = 16
_WARPS = 4


@triton.jit
def swizzle_kernel(
    linear,
    tiles,
    batch_stride,
    row_stride,
    rows,
    columns,
    row_tiles,
    column_tiles,
    parts,
    ASIDE: tl.constexpr,
    BYTES: tl.constexpr,
    FORTH: tl.constexpr,
):
    """ASIDE tiles side by side, each of 32 x 4 times BYTES scales; ``columns`` and strides count what is loaded.

    BYTES is 1 where a word holds the four scales of a row of a tile, 4 where they are bytes.
    """
    batch = tl.program_id(1).to(tl.int64)
    down = tl.program_id(0) // parts
    aside = (tl.program_id(0) % parts) * ASIDE
    # Each side is loaded and stored in its own order; the words move between threads.
    row = down * 128 + tl.arange(0, 128)[:, None]
    column = aside * BYTES + tl.arange(0, ASIDE * BYTES)[None, :]
    place = linear + batch * batch_stride + row.to(tl.int64) * row_stride + column
    inside = (row < rows) & (column < columns)
    position = tl.arange(0, ASIDE * 128 * BYTES)
    tiles += ((batch * row_tiles + down) * column_tiles + aside) * (128 * BYTES) + position
    present = aside + position // (128 * BYTES) < column_tiles
    if FORTH:
        words = tl.reshape(tl.load(place, inside, 0), (4, 32, ASIDE, BYTES))
        tl.store(tiles, tl.reshape(tl.permute(words, (2, 1, 0, 3)), (ASIDE * 128 * BYTES,)), present)
    else:
        words = tl.reshape(tl.load(tiles, present, 0), (ASIDE, 32, 4, BYTES))
        tl.store(place, tl.reshape(tl.permute(words, (2, 1, 0, 3)), (128, ASIDE * BYTES)), inside)


def _run(linear: Tensor, tiles: Tensor, forth: bool) -> None:
    """Between [B,R,C] and the tiles [B,Rp,Cp], contiguous, both bytes."""
    row_tiles, column_tiles = tiles.shape[1] // 128, tiles.shape[2] // 4
    starts = (linear.data_ptr(), linear.storage_offset(), *linear.stride()[:2], linear.shape[2], tiles.data_ptr())
    size = 1 if any(start % 4 for start in (*starts, tiles.storage_offset())) else 4
    if size == 4:
        linear, tiles = linear.view(torch.int32), tiles.view(torch.int32)
    parts = triton.cdiv(column_tiles, _ASIDE)
    swizzle_kernel[row_tiles * parts, len(linear)](
        linear,
        tiles,
        linear.stride(0),
        linear.stride(1),
        linear.shape[1],
        linear.shape[2],
        row_tiles,
        column_tiles,
        parts,
        ASIDE=_ASIDE,
        BYTES=4 // size,
        FORTH=forth,
        num_warps=_WARPS,
    )


def _programs(x: Tensor, *_: object) -> int:
    return triton.cdiv(x.shape[-2], 128) * triton.cdiv(x.shape[-1], 4)


@kernel("swizzle_scales", backend="triton", accepts=accepts(_programs))
def swizzle_scales(scales: Tensor, out: Tensor) -> None:
    with current(scales):
        _run(matrices_of(scales.view(torch.uint8)), matrices_of(out.view(torch.uint8)), forth=True)


@kernel("unswizzle_scales", backend="triton", accepts=accepts(_programs))
def unswizzle_scales(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
    with current(swizzled):
        tiles = matrices_of(swizzled.contiguous().view(torch.uint8))
        _run(matrices_of(out.view(torch.uint8)), tiles, forth=False)
