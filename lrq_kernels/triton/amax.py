"""Largest magnitude of every matrix of a batch, as float32 bits: their integer order is that of the magnitudes, and a
NaN is above all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.arithmetic import widen
from lrq_kernels.triton.launch import current, matrices_of, merged, refusal, tile_of, warps_of

_WEIGHTS, _HELD = 8192, 32
_PROGRAMS = 2048


@triton.jit
def amax_kernel(
    x, bits, batch_stride, row_stride, rows, columns, column_tiles, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``bits[b]`` becomes at least the largest magnitude of matrix b."""
    batch = tl.program_id(1)
    x += batch.to(tl.int64) * batch_stride
    best = tl.zeros((ROWS, COLUMNS), tl.int32)
    tile = tl.program_id(0)
    # Not a range: the interpreter of Triton 3.6 can't count with tensors under numpy 2.4.
    while tile < tiles:
        row = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        values = widen(tl.load(x + row.to(tl.int64) * row_stride + column, inside, 0.0))
        best = tl.maximum(best, tl.abs(values).to(tl.int32, bitcast=True))
        tile += tl.num_programs(0)
    tl.atomic_max(bits + batch, tl.max(best), sem="relaxed")


def _fill(matrices: Tensor, bits: Tensor) -> None:
    x = merged(matrices)
    tile = tile_of(x, _WEIGHTS)
    amax_kernel[min(tile.programs(x), _PROGRAMS), len(x)](
        x,
        bits.zero_(),
        x.stride(0),
        x.stride(1),
        x.shape[1],
        x.shape[2],
        tile.across(x),
        tile.programs(x),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=warps_of(tile.rows * tile.columns, _HELD),
    )


def amax_bits(x: Tensor) -> Tensor:
    """Bits of the largest magnitude of the matrices [B,M,N], int32 [B]; the last stride of ``x`` is 1."""
    bits = torch.empty(len(x), dtype=torch.int32, device=x.device)
    _fill(x, bits)
    return bits


@kernel("amax", backend="triton", accepts=refusal)
def amax(x: Tensor, out: Tensor) -> None:
    with current(x):
        _fill(matrices_of(x), out.view(torch.int32))
