"""The 128 x 4 tile layout in which cuBLAS reads block scales (SWIZZLE_32_4_4)."""

import torch
from torch import Tensor

from lrq_kernels.contract import check_matrix, check_size, operation, round_up

BYTES = (torch.uint8, torch.float8_e4m3fn)


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the swizzled scales of ``rows`` by ``columns`` blocks: whole tiles of 128 by 4."""
    return round_up(rows, 128), round_up(columns, 4)


@operation
def swizzle_scales(scales: Tensor) -> Tensor:
    """Lay block scales out in tiles of 128 rows by 4 columns, padding with zero bytes.

    Scale [r,c] goes to flat position ``((r//128)*(Cp/4) + c//4)*512 + (r%32)*16 + ((r%128)//32)*4 + c%4``
    of the padded buffer [Rp,Cp] (cuBLAS documentation, "1D block scaling factors layout").

    Args:
        scales: uint8 or float8_e4m3fn, [R,C] or [B,R,C].

    Returns:
        same dtype, [..,128*ceil(R/128),4*ceil(C/4)].
    """
    check_matrix("scales", scales, BYTES)
    return scales.new_empty((*scales.shape[:-2], *swizzled_shape(*scales.shape[-2:])))


@operation
def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`swizzle_scales`: the [..,rows,columns] block scales without padding.

    Raises:
        ValueError: ``swizzled`` is not the layout of ``rows`` by ``columns`` blocks.
    """
    check_matrix("swizzled", swizzled, BYTES)
    check_size(rows, columns)
    expected = swizzled_shape(rows, columns)
    if tuple(swizzled.shape[-2:]) != expected:
        raise ValueError(
            f"swizzled: {rows} x {columns} scales take shape {list(expected)}, got {list(swizzled.shape[-2:])}"
        )
    return swizzled.new_empty((*swizzled.shape[:-2], rows, columns))
