import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_kernels.dispatch import kernel
from lrq_kernels.ops.rounding_step import GRIDS, HALF, Grid, key_of, part_shape


def fractions(rows: int, columns: int, key: int, device: torch.device) -> Tensor:
    """The hash of every weight of a matrix in units of ``2^-24``, int64 [M,N]."""
    x = torch.arange(rows * columns, device=device).view(rows, columns) & 0xFFFFFFFF ^ key
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x >> 8


def gap(values: Tensor, slope: Tensor, grid: Grid) -> Tensor:
    """How far the neighbour of a value against the sign of the slope is, float32; of the last one beyond the grid."""
    bits = values.view(torch.int32)
    # Towards zero, the step below a power of two is that of the octave below.
    towards_zero = (bits ^ slope.view(torch.int32)) >= 0
    octave = ((bits & 0x7FFFFFFF) - towards_zero.int()).clamp(min=grid.least_octave) & 0x7F800000
    return (octave - (grid.mantissa << 23)).view(torch.float32)


def sums_of_parts(x: Tensor) -> Tensor:
    """Sum of every part of [..,M,N], neighbours added until one is left, [..,parts]."""
    rows, columns = part_shape(x.shape[-1])
    x = pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    x = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


@kernel("rounding_step", backend="reference")
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
    rows, columns = weight.shape[-2:]
    scale = scale.repeat_interleave(min(block_rows, rows), -2)[..., :rows, :]
    scale = scale.repeat_interleave(min(block_columns, columns), -1)[..., :columns]
    plain_weight, share = plain_weight[..., None, None], share[..., None, None]
    curvature = torch.ones_like(plain_weight)
    if row_curvature is not None:
        curvature = curvature * row_curvature[..., :, None]
    if column_curvature is not None:
        curvature = curvature * column_curvature[..., None, :]

    w, q = weight.float(), values.float()
    error = q * scale - w
    slope = gradient.float() + plain_weight * error
    distance = gap(q, slope, GRIDS[grid])
    moved = q - torch.copysign(distance, slope)
    least = (curvature + plain_weight) * scale * (distance * HALF)
    gains = (least > 0) & (slope.abs() > least) & (moved.abs() <= GRIDS[grid].largest)
    moves = gains & (fractions(rows, columns, key_of(seed, step), weight.device) < share * 2.0**24)

    q = torch.where(moves, moved, q)
    error = q * scale - w
    new_values.copy_(q)
    new_error.copy_(error)
    sums.copy_(torch.stack([sums_of_parts(error * error), sums_of_parts(moves.float())], -1))
