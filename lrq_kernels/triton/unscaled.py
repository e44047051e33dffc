"""Codes of one byte to weights, by one float32 scale for the matrix, a row or a square block."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.triton.arithmetic import narrow
from lrq_kernels.triton.codec import decode
from lrq_kernels.triton.launch import Tile, has_e4m3, matrices_of, merged, tile_of, warps_of

_WEIGHTS, _HELD = 8192, 32
_PIECE = 128


@triton.jit
def values_kernel(
    codes,
    scales,
    out,
    batch_stride,
    row_stride,
    rows,
    columns,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_ROW: tl.constexpr,
    FP8: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One scale for the matrix, or for each row."""
    batch = tl.program_id(1).to(tl.int64)
    rows_here = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)
    row = rows_here[:, None]
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(codes + batch * batch_stride + row.to(tl.int64) * row_stride + column, inside, 0)
    if BY_ROW:
        scale = tl.load(scales + batch * rows + rows_here, rows_here < rows, 0.0)[:, None]
    else:
        scale = tl.load(scales + batch)
    values = narrow(decode(values, FP8, HARDWARE) * scale, out.dtype.element_ty)
    tl.store(out + (batch * rows + row) * columns + column, values, inside)


@triton.jit
def pieces_kernel(
    codes,
    scales,
    out,
    batch_stride,
    row_stride,
    rows,
    columns,
    across,
    tiles_across,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
    PIECES: tl.constexpr,
    FP8: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """PIECES neighbours of the PARTS by PARTS pieces of each block; PIECE wide, padded to SIDE, a power of two."""
    batch = tl.program_id(1).to(tl.int64)
    down = tl.program_id(0) // tiles_across
    pieces_here = (tl.program_id(0) % tiles_across) * PIECES + tl.arange(0, PIECES)
    piece = pieces_here[None, :, None]
    row = (down % PARTS) * PIECE + tl.arange(0, SIDE)[:, None, None]
    column = (piece % PARTS) * PIECE + tl.arange(0, SIDE)[None, None, :]
    inside = (piece < across * PARTS) & (row < BLOCK) & (column < BLOCK)
    if PIECE != SIDE:
        inside &= (tl.arange(0, SIDE)[:, None, None] < PIECE) & (tl.arange(0, SIDE)[None, None, :] < PIECE)
    column += (piece // PARTS) * BLOCK
    row = row + (down // PARTS).to(tl.int64) * BLOCK
    values = tl.load(codes + batch * batch_stride + row * row_stride + column, inside, 0)
    block_row = batch * (rows // BLOCK) + down // PARTS
    scale = tl.load(scales + block_row * across + pieces_here // PARTS, pieces_here < across * PARTS, 0.0)
    scale = scale[None, :, None]
    values = narrow(decode(values, FP8, HARDWARE) * scale, out.dtype.element_ty)
    tl.store(out + (batch * rows + row) * columns + column, values, inside)


def pieces_config(block: int, across: int) -> dict[str, int]:
    """How `pieces_kernel` cuts blocks, ``across`` of them side by side."""
    parts = triton.cdiv(block, _PIECE)
    piece = triton.cdiv(block, parts)
    side = triton.next_power_of_2(piece)
    pieces = max(min(_WEIGHTS // side**2, triton.next_power_of_2(across * parts)), 1)
    warps = warps_of(side * pieces * side, _HELD)
    return {"BLOCK": block, "PARTS": parts, "PIECE": piece, "SIDE": side, "PIECES": pieces, "num_warps": warps}


def _constants(x: Tensor, fp8: bool) -> dict[str, Any]:
    return {"FP8": fp8, "HARDWARE": has_e4m3(x), "enable_fp_fusion": False}


def dequantize(codes: Tensor, scale: Tensor, out: Tensor, fp8: bool) -> None:
    """``out`` becomes the weights of codes [..,M,N]; which of them share a scale is read off its shape."""
    rows = codes.shape[-2]
    matrix = scale.dim() == codes.dim() - 2
    row = scale.dim() == codes.dim() - 1 or (not matrix and scale.shape[-2:] == (rows, 1))
    x, scale = matrices_of(codes.view(torch.uint8)), scale.detach().contiguous()
    if matrix or row:
        x = merged(x) if matrix else x
        tile = tile_of(x, _WEIGHTS)
        values_kernel[tile.programs(x), len(x)](
            x,
            scale,
            out,
            x.stride(0),
            x.stride(1),
            x.shape[1],
            x.shape[2],
            tile.across(x),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            BY_ROW=row,
            num_warps=warps_of(tile.rows * tile.columns, _HELD),
            **_constants(x, fp8),
        )
        return
    across = scale.shape[-1]
    config = pieces_config(rows // scale.shape[-2], across)
    tiles_across = triton.cdiv(across * config["PARTS"], config["PIECES"])
    pieces_kernel[scale.shape[-2] * config["PARTS"] * tiles_across, len(x)](
        x,
        scale,
        out,
        x.stride(0),
        x.stride(1),
        x.shape[1],
        x.shape[2],
        across,
        tiles_across,
        **config,
        **_constants(x, fp8),
    )


def programs(codes: Tensor, *_: Any) -> int:
    """At least as many programs as expanding a matrix launches."""
    return codes.shape[-2] * Tile(1, _WEIGHTS).across(codes)
