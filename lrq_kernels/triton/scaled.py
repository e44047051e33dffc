"""Weights to codes of one byte, by one float32 scale for the matrix, a row or a square block."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.contract import width
from lrq_kernels.triton.amax import amax_bits
from lrq_kernels.triton.arithmetic import widen
from lrq_kernels.triton.codec import encode, encode_by_given, reciprocal_of, scale_of
from lrq_kernels.triton.launch import INTERPRETED, Tile, has_e4m3, merged, tile_of, warps_of

_MATRIX_WEIGHTS, _MATRIX_HELD = 8192, 32
_CHUNK, _MOST_CHUNKS = 2048, 8
_ROWS_WEIGHTS = 2048
_BLOCK, _BLOCKS_WEIGHTS = 128, 8192
_REGION_WEIGHTS = 8192


@triton.jit
def matrix_kernel(
    x,
    source,
    codes,
    scales,
    batch_stride,
    row_stride,
    rows,
    columns,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GIVEN: tl.constexpr,
    FP8: tl.constexpr,
    FUSED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One scale for the matrix: ``source`` has it if GIVEN, else the bits of the amax."""
    tile = tl.program_id(0)
    if not GIVEN:
        # Backwards: the end of the matrix is what the pass over amax left in the L2 cache.
        tile = tl.num_programs(0) - 1 - tile
    batch = tl.program_id(1).to(tl.int64)
    row = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(x + batch * batch_stride + row.to(tl.int64) * row_stride + column, inside, 0.0)
    if GIVEN:
        scale = tl.load(source + batch)
        encoded = encode_by_given(widen(values), scale, FP8, FUSED, HARDWARE)
    else:
        scale = scale_of(tl.load(source + batch).to(tl.float32, bitcast=True), True, FP8)
        encoded = encode(widen(values), scale, reciprocal_of(scale), FP8, FUSED, HARDWARE)
    if tile == 0:
        tl.store(scales + batch, scale)
    tl.store(codes + (batch * rows + row) * columns + column, encoded, inside)


@triton.jit
def rows_kernel(
    x,
    codes,
    scales,
    batch_stride,
    row_stride,
    rows,
    columns,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    FP8: tl.constexpr,
    FUSED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ROWS whole rows, held in CHUNKS parts."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    x += batch * batch_stride + row.to(tl.int64) * row_stride + column
    held = ()
    for j in tl.static_range(CHUNKS):
        inside = (row < rows) & (column + j * CHUNK < columns)
        held = held + (tl.load(x + j * CHUNK, inside, 0.0),)
    best = tl.zeros((ROWS, CHUNK), tl.float32)
    for j in tl.static_range(CHUNKS):
        best = tl.maximum(best, tl.abs(widen(held[j])))
    scale = scale_of(tl.max(best, axis=1, keep_dims=True), False, FP8)
    tl.store(scales + batch * rows + row, scale, row < rows)
    parts = reciprocal_of(scale)
    codes += (batch * rows + row) * columns + column
    for j in tl.static_range(CHUNKS):
        inside = (row < rows) & (column + j * CHUNK < columns)
        tl.store(codes + j * CHUNK, encode(widen(held[j]), scale, parts, FP8, FUSED, HARDWARE), inside)


@triton.jit
def blocks_kernel(
    x,
    codes,
    scales,
    batch_stride,
    row_stride,
    rows,
    columns,
    blocks_across,
    tiles_across,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
    FUSED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """BLOCKS neighbouring blocks, each BLOCK wide and padded to SIDE, a power of two."""
    batch = tl.program_id(1).to(tl.int64)
    down = tl.program_id(0) // tiles_across
    block = (tl.program_id(0) % tiles_across) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    row = tl.arange(0, SIDE)[:, None, None]
    column = tl.arange(0, SIDE)[None, None, :]
    inside = (block < blocks_across) & (row < BLOCK) & (column < BLOCK)
    column += block * BLOCK
    row = row + (down * BLOCK).to(tl.int64)
    values = tl.load(x + batch * batch_stride + row * row_stride + column, inside, 0.0)
    scale = scale_of(tl.max(tl.max(tl.abs(widen(values)), axis=2, keep_dims=True), axis=0, keep_dims=True), False, FP8)
    down_of_all = batch * (rows // BLOCK) + down
    tl.store(scales + down_of_all * blocks_across + block, scale, block < blocks_across)
    encoded = encode(widen(values), scale, reciprocal_of(scale), FP8, FUSED, HARDWARE)
    tl.store(codes + (batch * rows + row) * columns + column, encoded, inside)


@triton.jit
def region_kernel(
    x,
    codes,
    scales,
    batch_stride,
    row_stride,
    rows,
    columns,
    region_rows,
    region_columns,
    regions_across,
    tiles_across,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
    FUSED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A row or a block too large to be held: read twice, backwards the second time."""
    batch = tl.program_id(1).to(tl.int64)
    first_row = (tl.program_id(0) // regions_across).to(tl.int64) * region_rows
    first_column = (tl.program_id(0) % regions_across) * region_columns
    x += batch * batch_stride + first_row * row_stride + first_column
    codes += (batch * rows + first_row) * columns + first_column
    best = tl.zeros((ROWS, COLUMNS), tl.float32)
    tile = tl.program_id(0) * 0
    while tile < tiles:
        row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < region_rows) & (column < region_columns)
        values = tl.load(x + row.to(tl.int64) * row_stride + column, inside, 0.0)
        best = tl.maximum(best, tl.abs(widen(values)))
        tile += 1
    scale = scale_of(tl.max(best), False, FP8)
    tl.store(scales + batch * (rows // region_rows) * regions_across + tl.program_id(0), scale)
    parts = reciprocal_of(scale)
    while tile > 0:
        tile -= 1
        row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < region_rows) & (column < region_columns)
        values = tl.load(x + row.to(tl.int64) * row_stride + column, inside, 0.0)
        encoded = encode(widen(values), scale, parts, FP8, FUSED, HARDWARE)
        tl.store(codes + row.to(tl.int64) * columns + column, encoded, inside)


def _constants(x: Tensor, fp8: bool) -> dict[str, Any]:
    return {"FP8": fp8, "FUSED": not INTERPRETED, "HARDWARE": has_e4m3(x), "enable_fp_fusion": False}


def _layout(x: Tensor) -> tuple[int, ...]:
    return x.stride(0), x.stride(1), x.shape[1], x.shape[2]


def quantize_matrix(x: Tensor, given: Tensor | None, codes: Tensor, scales: Tensor, fp8: bool) -> None:
    """One scale for each of the matrices [B,M,N]."""
    source = amax_bits(x) if given is None else given.detach().contiguous()
    x = merged(x)
    tile = tile_of(x, _MATRIX_WEIGHTS)
    matrix_kernel[tile.programs(x), len(x)](
        x,
        source,
        codes,
        scales,
        *_layout(x),
        tile.across(x),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GIVEN=given is not None,
        num_warps=warps_of(tile.rows * tile.columns, _MATRIX_HELD),
        **_constants(x, fp8),
    )


def rows_config(columns: int) -> dict[str, int] | None:
    """How `rows_kernel` holds rows, None if they are too long for it."""
    chunk = width(columns, _CHUNK)
    while columns > _MOST_CHUNKS * chunk and chunk < _CHUNK:
        chunk *= 2
    chunks = triton.cdiv(columns, chunk)
    if chunks > _MOST_CHUNKS:
        return None
    rows = max(_ROWS_WEIGHTS // chunk, 1) if chunks == 1 else 1
    # Few warps share a short row: their maximum waits for few.
    held = 32 if chunks == 1 else 8
    return {"ROWS": rows, "CHUNK": chunk, "CHUNKS": chunks, "num_warps": warps_of(rows * chunk, held)}


def quantize_rows(x: Tensor, codes: Tensor, scales: Tensor, fp8: bool) -> None:
    """A scale for each row of [B,M,N]."""
    config = rows_config(x.shape[2])
    if config is None:
        quantize_regions(x, 1, x.shape[2], codes, scales, fp8)
        return
    rows_kernel[triton.cdiv(x.shape[1], config["ROWS"]), len(x)](
        x, codes, scales, *_layout(x), **config, **_constants(x, fp8)
    )


def blocks_config(block: int, across: int) -> dict[str, int]:
    """How `blocks_kernel` holds blocks."""
    side = triton.next_power_of_2(block)
    blocks = max(min(_BLOCKS_WEIGHTS // side**2, triton.next_power_of_2(across)), 1)
    warps = warps_of(side * blocks * side, 32)
    return {"BLOCK": block, "SIDE": side, "BLOCKS": blocks, "num_warps": warps}


def quantize_blocks(x: Tensor, block: int, codes: Tensor, scales: Tensor, fp8: bool) -> None:
    """A scale for each square block of [B,M,N]."""
    if block > _BLOCK:
        quantize_regions(x, block, block, codes, scales, fp8)
        return
    across = x.shape[2] // block
    config = blocks_config(block, across)
    tiles_across = triton.cdiv(across, config["BLOCKS"])
    blocks_kernel[x.shape[1] // block * tiles_across, len(x)](
        x, codes, scales, *_layout(x), across, tiles_across, **config, **_constants(x, fp8)
    )


def quantize_regions(x: Tensor, rows: int, columns: int, codes: Tensor, scales: Tensor, fp8: bool) -> None:
    """A scale for every ``rows`` by ``columns`` of [B,M,N], whatever their size."""
    region = torch.empty(rows, columns, device="meta")
    tile = tile_of(region, _REGION_WEIGHTS)
    across = x.shape[2] // columns
    region_kernel[x.shape[1] // rows * across, len(x)](
        x,
        codes,
        scales,
        *_layout(x),
        rows,
        columns,
        across,
        tile.across(region),
        tile.programs(region),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=8,
        **_constants(x, fp8),
    )


def programs(x: Tensor, scaling: str, block: int, *_: Any) -> int:
    """At least as many programs as quantizing a matrix launches."""
    if scaling == "block":
        return x.shape[-2] // block * (x.shape[-1] // block)
    return x.shape[-2] * Tile(1, _MATRIX_WEIGHTS).across(x)
