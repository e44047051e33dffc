"""Blocks of weights in the order of their swizzled scales.

Matrices are the second dimension of the grid.
"""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import narrow, widen


@triton.jit
def place_blocks(tile, index, blocks, SHARE: tl.constexpr):
    """Row, block of the row, and position among the scales of ``index``; SHARE a program, 512 a tile."""
    column_tiles = tl.cdiv(blocks, 4)
    part = tile // column_tiles
    column_tile = tile - part * column_tiles
    tile_row = part // (512 // SHARE)
    place = (part & (512 // SHARE - 1)) * SHARE + index
    # Shifts and masks: divisions of signed numbers take more.
    row = tile_row * 128 + (place >> 4) + ((place & 12) << 3)
    return row, column_tile * 4 + (place & 3), (tile_row.to(tl.int64) * column_tiles + column_tile) * 512 + place


@triton.jit
def load_16(x, row, column, batch_stride, row_stride, rows, columns):
    """16 columns from ``column`` on, a tensor each; 16 bytes a load where all is aligned."""
    x += tl.program_id(1).to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride + column
    left = tl.where(row < rows, columns - column, 0)
    if x.dtype.scalar.element_ty == tl.float32:
        x0, x1, x2, x3 = _load_4(x, left, 0)
        x4, x5, x6, x7 = _load_4(x, left, 4)
        x8, x9, x10, x11 = _load_4(x, left, 8)
        x12, x13, x14, x15 = _load_4(x, left, 12)
    else:
        x0, x1, x2, x3, x4, x5, x6, x7 = _load_8(x, left, 0)
        x8, x9, x10, x11, x12, x13, x14, x15 = _load_8(x, left, 8)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _load(x, left, FIRST: tl.constexpr, COUNT: tl.constexpr):
    offset = FIRST + tl.arange(0, COUNT)[None, :]
    return widen(tl.load(x[:, None] + offset, offset < left[:, None], 0.0))


@triton.jit
def _load_4(x, left, FIRST: tl.constexpr):
    even, odd = tl.split(tl.reshape(_load(x, left, FIRST, 4), (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _load_8(x, left, FIRST: tl.constexpr):
    even, odd = tl.split(tl.reshape(_load(x, left, FIRST, 8), (x.shape[0], 2, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    x0, x4 = tl.split(first)
    x1, x5 = tl.split(second)
    x2, x6 = tl.split(third)
    x3, x7 = tl.split(fourth)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def store_scales(block_scales, position, scale, scale_rows, blocks):
    place = block_scales + tl.program_id(1).to(tl.int64) * scale_rows * (tl.cdiv(blocks, 4) * 4) + position
    tl.store(place, scale.to(tl.uint8))


@triton.jit
def load_scales(block_scales, position, scale_rows, blocks):
    """Bytes of scales, int32."""
    place = block_scales + tl.program_id(1).to(tl.int64) * scale_rows * (tl.cdiv(blocks, 4) * 4) + position
    return tl.load(place).to(tl.int32)


@triton.jit
def store_values(out, values, row, column, rows, columns):
    """Neighbours of a row from ``column`` on, in the type of ``out``, which is contiguous."""
    column = column[:, None] + tl.arange(0, values.shape[1])[None, :]
    place = out + (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * columns + column
    tl.store(place, narrow(values, out.dtype.element_ty), (row < rows)[:, None] & (column < columns))


def programs(rows: int, columns: int, block: int, share: int) -> int:
    """How many programs of ``share`` blocks cover a matrix."""
    return triton.cdiv(rows, 128) * triton.cdiv(columns, 4 * block) * (512 // share)
