"""4-bit codes in Triton: eight at once where rows are words, else one by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.launch import Tile, accepts, current, matrices_of, merged, tile_of, warps_of

_BYTES, _HELD = 8192, 32


@triton.jit
def pack_kernel(
    codes,
    out,
    batch_stride,
    row_stride,
    rows,
    columns,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
):
    """``columns`` of ``out``: uint8, or int32 from codes that are int64."""
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    codes += batch * batch_stride + row.to(tl.int64) * row_stride
    if WORDS:
        kept = tl.load(codes + column, inside, 0) & 0x0F0F0F0F0F0F0F0F
        if HIGH_FIRST:
            pairs = kept << 4 | kept >> 8
        else:
            pairs = kept | kept >> 4
        pairs &= 0x00FF00FF00FF00FF
        pairs = (pairs | pairs >> 8) & 0x0000FFFF0000FFFF
        packed = (pairs | pairs >> 16).to(tl.int32)
    else:
        even = tl.load(codes + column * 2, inside, 0) & 15
        odd = tl.load(codes + column * 2 + 1, inside, 0) & 15
        if HIGH_FIRST:
            packed = even << 4 | odd
        else:
            packed = odd << 4 | even
    tl.store(out + (batch * rows + row) * columns + column, packed, inside)


@triton.jit
def unpack_kernel(
    packed,
    out,
    batch_stride,
    row_stride,
    rows,
    columns,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
):
    """``columns`` of ``packed``: uint8, or int32 to codes that are int64."""
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    pairs = tl.load(packed + batch * batch_stride + row.to(tl.int64) * row_stride + column, inside, 0)
    place = (batch * rows + row) * columns + column
    if WORDS:
        pairs = pairs.to(tl.int64) & 0xFFFFFFFF
        pairs = (pairs | pairs << 16) & 0x0000FFFF0000FFFF
        pairs = (pairs | pairs << 8) & 0x00FF00FF00FF00FF
        if HIGH_FIRST:
            codes = pairs >> 4 | pairs << 8
        else:
            codes = pairs | pairs << 4
        tl.store(out + place, codes & 0x0F0F0F0F0F0F0F0F, inside)
    else:
        high, low = pairs >> 4, pairs & 15
        tl.store(out + place * 2, high if HIGH_FIRST else low, inside)
        tl.store(out + place * 2 + 1, low if HIGH_FIRST else high, inside)


def _as_words(x: Tensor, size: int, dtype: torch.dtype) -> Tensor | None:
    """Bytes [B,M,N] as words of so many bytes, None if rows are no whole words."""
    starts = (
        x.data_ptr(),
        x.storage_offset(),
        x.shape[2],
        *(s for s, n in zip(x.stride()[:2], x.shape[:2], strict=True) if n > 1),
    )
    if any(start % size for start in starts):
        return None
    shape = (x.shape[0], x.shape[1], x.shape[2] // size)
    strides = (x.stride(0) // size, x.stride(1) // size, 1)
    return x.view(-1).view(dtype).view(shape) if x.is_contiguous() else _strided_words(x, dtype, shape, strides)


def _strided_words(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor | None:
    # What torch can't see as words although they are, single matrices with an odd stride, goes byte by byte.
    odd = any(s % dtype.itemsize for s in x.stride()[:2])
    return None if odd else x.view(dtype).as_strided(shape, strides)


def _convert(kernel, x: Tensor, high_first: bool, out: Tensor, sizes: tuple[int, int]) -> None:
    """``sizes`` are the bytes of an input and an output word that hold the same codes."""
    types = {4: torch.int32, 8: torch.int64}
    x = merged(matrices_of(x), 8)
    words = _as_words(x, sizes[0], types[sizes[0]])
    if words is not None and out.data_ptr() % sizes[1] == 0:
        x, out = words, out.view(-1).view(types[sizes[1]])
    else:
        words = None
    columns = x.shape[2] if words is not None or kernel is unpack_kernel else x.shape[2] // 2
    tiled = torch.empty(x.shape[1], columns, device="meta")
    tile = tile_of(tiled, _BYTES // (8 if words is not None else 2))
    kernel[tile.programs(tiled), len(x)](
        x,
        out,
        x.stride(0),
        x.stride(1),
        x.shape[1],
        columns,
        tile.across(tiled),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        WORDS=words is not None,
        HIGH_FIRST=high_first,
        num_warps=warps_of(tile.rows * tile.columns, 4 if words is not None else 16),
    )


def _programs(x: Tensor, *_: object) -> int:
    return x.shape[-2] * Tile(1, _BYTES // 8).across(x)


@kernel("pack_fp4", backend="triton", accepts=accepts(_programs))
def pack_fp4(codes: Tensor, high_first: bool, out: Tensor) -> None:
    with current(codes):
        _convert(pack_kernel, codes, high_first, out, (8, 4))


@kernel("unpack_fp4", backend="triton", accepts=accepts(_programs))
def unpack_fp4(packed: Tensor, high_first: bool, out: Tensor) -> None:
    with current(packed):
        _convert(unpack_kernel, packed, high_first, out, (4, 8))
