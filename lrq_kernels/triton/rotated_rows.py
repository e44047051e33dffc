"""Rows rotated by a Hadamard matrix, to codes of one byte with one float32 scale for each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.contract import width
from lrq_kernels.triton.codec import encode, reciprocal_of, scale_of
from lrq_kernels.triton.hadamard import placed, rotated
from lrq_kernels.triton.launch import INTERPRETED, warps_of

_CHUNK, _MOST_CHUNKS = 4096, 5
_ROWS_WEIGHTS = 2048
_HELD = 64
"""Weights of a thread, about: fewer wait for more of shared memory, more spill."""


@triton.jit
def rotated_rows_kernel(
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
    GROUP: tl.constexpr,
    FUSED: tl.constexpr,
):
    """ROWS whole rows, held in CHUNKS parts, INT8."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    x += batch * batch_stride + row.to(tl.int64) * row_stride + column
    raw = ()
    for j in tl.static_range(CHUNKS):
        inside = (row < rows) & (column + j * CHUNK < columns)
        raw = raw + (tl.load(x + j * CHUNK, inside, 0.0),)
    held = ()
    for j in tl.static_range(CHUNKS):
        held = held + (rotated(raw[j], GROUP),)
    best = tl.abs(held[0])
    for j in tl.static_range(1, CHUNKS):
        best = tl.maximum(best, tl.abs(held[j]))
    DIGITS: tl.constexpr = best.shape[0]
    if ROWS == 1:
        # A scalar: Triton 3.7 would trace the layout of a stored [1,1] back through the rotation, and spill.
        scale = scale_of(tl.max(best), False, False)
        tl.store(scales + batch * rows + tl.program_id(0), scale)
    else:
        of_rows = tl.reshape(tl.max(best, axis=0), (ROWS, CHUNK // DIGITS))
        scale = scale_of(tl.max(of_rows, axis=1), False, False)
        own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tl.store(scales + batch * rows + own, scale, own < rows)
        spread = tl.broadcast_to(scale[:, None], (ROWS, CHUNK // DIGITS))
        scale = tl.reshape(spread, (1, ROWS * CHUNK // DIGITS))
    parts = reciprocal_of(scale)
    codes += (batch * rows + row) * columns + column
    for j in tl.static_range(CHUNKS):
        inside = (row < rows) & (column + j * CHUNK < columns)
        encoded = encode(held[j], scale, parts, False, FUSED, False)
        tl.store(codes + j * CHUNK, placed(encoded, ROWS, CHUNK, GROUP), inside)


def rotated_rows_config(columns: int, group: int) -> dict[str, int] | None:
    """How `rotated_rows_kernel` holds rows in float32, None if they are too long for it."""
    chunk = width(columns, _CHUNK, max(16, group))
    while columns > _MOST_CHUNKS * chunk and chunk < _CHUNK:
        chunk *= 2
    chunks = triton.cdiv(columns, chunk)
    if chunks > _MOST_CHUNKS:
        return None
    rows = max(_ROWS_WEIGHTS // chunk, 1) if chunks == 1 else 1
    held = _HELD if chunks == 1 else _HELD // 2 if chunks <= 3 else _HELD // 4
    return {"ROWS": rows, "CHUNK": chunk, "CHUNKS": chunks, "GROUP": group, "num_warps": warps_of(rows * chunk, held)}


def quantize_rotated_rows(x: Tensor, config: dict[str, int], codes: Tensor, scales: Tensor) -> None:
    """A scale for each row of [B,M,N] after its rotation."""
    rotated_rows_kernel[triton.cdiv(x.shape[1], config["ROWS"]), len(x)](
        x,
        codes,
        scales,
        x.stride(0),
        x.stride(1),
        x.shape[1],
        x.shape[2],
        **config,
        FUSED=not INTERPRETED,
        enable_fp_fusion=False,
    )
