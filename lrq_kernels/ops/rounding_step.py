"""The parallel step of discrete learned rounding: of all weights that gain by moving, a random share moves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.contract import check_device, check_matrix, check_shape, check_tensor, operation, round_up, width

PART = 2048
"""Weights whose errors are summed together."""
HALF = 0.5 + 2.0**-14
"""The share of a step's own curvature that the slope must exceed; a bit more than 1/2: float32 noise moves nothing."""


@dataclass(frozen=True)
class Grid:
    """Numbers with so many bits of mantissa, evenly spaced below ``2^exponent``, where all of INT8 lies."""

    mantissa: int
    exponent: int
    largest: float

    @property
    def least_octave(self) -> int:
        """float32 bits of ``2^exponent``."""
        return (self.exponent + 127) << 23


GRIDS = {"e2m1": Grid(1, 0, 6.0), "e4m3": Grid(3, -6, 448.0), "int8": Grid(7, 7, 127.0)}


def part_shape(columns: int) -> tuple[int, int]:
    """Rows and columns of a part of a matrix with so many columns."""
    wide = width(columns, PART, 32)
    return PART // wide, wide


def key_of(seed: int, step: int) -> int:
    """32 bits that select the weights of one step (the finalizer of SplitMix64; Steele, Lea and Flood, 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + 1) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return (z ^ z >> 31) & 0xFFFFFFFF


@operation
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Move a random share of the weights that gain by it, each to a neighbour on its grid.

    With the error ``E = values*scale - weight``, the objective is ``|U'EV|^2 + λ|E|^2``. If one weight alone moves by
    ``d`` (its error by ``d*scale``), that changes by ``2*d*scale*slope + (d*scale)^2*h`` with ``slope = gradient + λE``
    and ``h = row_curvature*column_curvature + λ``. The step goes from the value to its neighbour against the sign of
    the slope, if there is one and the objective falls: ``|slope| > HALF * |d| * h*scale > 0``. Nothing moves where a
    scale or ``h`` is zero. In float32, nothing fused.

    A weight may move if its hash is below ``share``: of the 32 bits ``x = key_of(seed, step) ^ (row*N + column)``,
    ``x ^= x>>16; x *= 0x7feb352d; x ^= x>>15; x *= 0x846ca68b`` the upper 24, as a fraction of ``2^24`` (the first
    rounds of lowbias32; Wellons, 2018). All matrices of a batch have the same hashes.

    Args:
        weight: [M,N] or [B,M,N], float32, bfloat16 or float16, finite.
        values: bfloat16 [..,M,N], on the grid.
        scale: float32 [..,ceil(M/block_rows),ceil(N/block_columns)], not negative.
        gradient: ``U(U'EV)V'``, float32 or bfloat16 [..,M,N].
        row_curvature: ``diag(UU')``, float32 [..,M]; None: ones.
        column_curvature: ``diag(VV')``, float32 [..,N]; None: ones.
        plain_weight: λ >= 0, float32 [..].
        share: float32 [..]; 0 moves nothing, 1 all that gain.
        seed, step: any integers; each pair selects other weights.
        grid: ``e2m1``, ``e4m3`` or ``int8``.

    Returns:
        values: bfloat16 [..,M,N], moved.
        error: bfloat16 [..,M,N], ``values*scale - weight`` of the moved values, rounded from float32.
        sums: float32 [..,parts,2]: of each part (:func:`part_shape`, row-major) the squares of the errors before they
            are rounded, added by neighbours until one is left (Triton: in its own order), and the number of moves.

    Raises:
        TypeError, ValueError: dtype, shape, block or grid out of the above.
    """
    check_matrix("weight", weight)
    shape, batch = tuple(weight.shape), tuple(weight.shape[:-2])
    rows, columns = shape[-2:]
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
    if block_rows < 1 or block_columns < 1:
        raise ValueError(f"block_rows and block_columns must be positive, got {block_rows} and {block_columns}")
    blocks = round_up(rows, block_rows) // block_rows, round_up(columns, block_columns) // block_columns
    check_tensor("gradient", gradient)
    gradient_dtype = torch.bfloat16 if gradient.dtype == torch.bfloat16 else torch.float32
    for name, x, expected, dtype in (
        ("values", values, shape, torch.bfloat16),
        ("scale", scale, (*batch, *blocks), torch.float32),
        ("gradient", gradient, shape, gradient_dtype),
        ("row_curvature", row_curvature, (*batch, rows), torch.float32),
        ("column_curvature", column_curvature, (*batch, columns), torch.float32),
        ("plain_weight", plain_weight, batch, torch.float32),
        ("share", share, batch, torch.float32),
    ):
        if x is not None:
            check_shape(name, x, expected, dtype)
            check_device(name, x, weight)
        elif not name.endswith("_curvature"):
            check_tensor(name, x)
    part_rows, part_columns = part_shape(columns)
    parts = (round_up(rows, part_rows) // part_rows) * (round_up(columns, part_columns) // part_columns)
    return (
        weight.new_empty(shape, dtype=torch.bfloat16),
        weight.new_empty(shape, dtype=torch.bfloat16),
        weight.new_empty((*batch, parts, 2), dtype=torch.float32),
    )
