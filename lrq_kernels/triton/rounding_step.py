"""The step of discrete rounding in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.ops.rounding_step import GRIDS, HALF, key_of, part_shape
from lrq_kernels.triton.arithmetic import narrow, widen
from lrq_kernels.triton.launch import Tile, accepts, current, matrices_of

_HALF = tl.constexpr(HALF)
_WARPS = 4


@triton.jit
def _fraction(index, key):
    """The hash of a weight in units of 2^-24, int32."""
    x = index.to(tl.uint32, bitcast=True) ^ key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x >> 8).to(tl.int32)


@triton.jit
def _gap(values, slope, MANTISSA: tl.constexpr, LEAST_OCTAVE: tl.constexpr):
    """How far the neighbour of a value against the sign of the slope is."""
    bits = values.to(tl.int32, bitcast=True)
    # Towards zero, the step below a power of two is that of the octave below.
    towards_zero = ((bits ^ slope.to(tl.int32, bitcast=True)) >> 31) + 1
    octave = tl.maximum((bits & 0x7FFFFFFF) - towards_zero, LEAST_OCTAVE) & 0x7F800000
    return (octave - (MANTISSA << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _to_each(x, SHARED: tl.constexpr):
    """Every element SHARED times."""
    if SHARED == 1:
        return x
    groups: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[:, None], (groups, SHARED)), (groups * SHARED,))


@triton.jit(do_not_specialize=["key"])
def step_kernel(
    x,
    values,
    scales,
    gradient,
    row_curvature,
    column_curvature,
    plain_weight,
    share,
    out,
    errors,
    sums,
    key,
    rows,
    columns,
    block_rows,
    block_columns,
    scale_rows,
    scale_columns,
    column_parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    MANTISSA: tl.constexpr,
    LEAST_OCTAVE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """A part of contiguous matrices; ``values`` and ``x`` are those before the move.

    It is flat: the threads of a part of several rows would otherwise exchange what they hold. SHARED neighbours lie in
    one row and have one scale, which is loaded once.
    """
    WEIGHTS: tl.constexpr = ROWS * COLUMNS
    part = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    top = (part // column_parts) * ROWS
    left = (part % column_parts) * COLUMNS
    index = tl.arange(0, WEIGHTS)
    row = top + index // COLUMNS
    column = left + index % COLUMNS
    inside = (row < rows) & (column < columns)
    begin = (batch * rows + top) * columns + left
    place = (index // COLUMNS) * columns + index % COLUMNS
    w = widen(tl.load(x + begin + place, inside, 0.0))
    q = widen(tl.load(values + begin + place, inside, 0.0))
    g = widen(tl.load(gradient + begin + place, inside, 0.0))
    first = tl.arange(0, WEIGHTS // SHARED) * SHARED
    its_row = top + first // COLUMNS
    its_column = left + first % COLUMNS
    present = (its_row < rows) & (its_column < columns)
    block = (batch * scale_rows + its_row // block_rows) * scale_columns + its_column // block_columns
    scale = _to_each(tl.load(scales + block, present, 0.0), SHARED)
    plain = tl.load(plain_weight + batch)
    curvature = tl.zeros((WEIGHTS,), tl.float32) + 1.0
    if row_curvature is not None:
        curvature *= _to_each(tl.load(row_curvature + batch * rows + its_row, present, 0.0), SHARED)
    if column_curvature is not None:
        curvature *= tl.load(column_curvature + batch * columns + column, column < columns, 0.0)

    error = q * scale - w
    slope = g + plain * error
    distance = _gap(q, slope, MANTISSA, LEAST_OCTAVE)
    moved = tl.where(slope.to(tl.int32, bitcast=True) < 0, q + distance, q - distance)
    least = (curvature + plain) * scale * (distance * _HALF)
    gains = (least > 0) & (tl.abs(slope) > least) & (tl.abs(moved) <= LARGEST)
    below = tl.load(share + batch) * 16777216.0
    moves = gains & (_fraction(top * columns + left + place, key).to(tl.float32) < below) & inside

    q = tl.where(moves, moved, q)
    error = q * scale - w
    tl.store(out + begin + place, narrow(q, tl.bfloat16), inside)
    tl.store(errors + begin + place, narrow(error, tl.bfloat16), inside)
    # In Triton's own order: adding neighbours through reshapes takes as long again as all the rest.
    total = sums + (batch * tl.num_programs(0) + part) * 2
    tl.store(total, tl.sum(error * error))
    tl.store(total + 1, tl.sum(moves.to(tl.int32)).to(tl.float32))


def _programs(weight: Tensor, *_: object) -> int:
    return Tile(*part_shape(weight.shape[-1])).programs(weight)


def _shared(columns: int, block_columns: int) -> int:
    """How many neighbours, as a thread holds them, always have one scale."""
    return 8 if columns % 8 == 0 and (block_columns % 8 == 0 or block_columns >= columns) else 1


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


@kernel("rounding_step", backend="triton", accepts=accepts(_programs))
def rounding_step(
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    gradient: Tensor,
    row_curvature: Tensor | None,
    column_curvature: Tensor | None,
    plain_weight: Tensor,
    share: Tensor,
    seed: int,
    step: int,
    grid: str,
    new_values: Tensor,
    new_error: Tensor,
    sums: Tensor,
) -> None:
    x = matrices_of(weight.contiguous())
    rows, columns = x.shape[1:]
    tile = Tile(*part_shape(columns))
    numbers = GRIDS[grid]
    key = key_of(seed, step)
    tensors = (weight, values, scale, gradient, row_curvature, column_curvature, plain_weight, share)
    with current(x):
        step_kernel[tile.programs(x), len(x)](
            *map(_dense, tensors),
            new_values,
            new_error,
            sums,
            key - (key >> 31 << 32),
            rows,
            columns,
            min(block_rows, rows),
            min(block_columns, columns),
            scale.shape[-2],
            scale.shape[-1],
            tile.across(x),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            SHARED=_shared(columns, block_columns),
            MANTISSA=numbers.mantissa,
            LEAST_OCTAVE=numbers.least_octave,
            LARGEST=numbers.largest,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
