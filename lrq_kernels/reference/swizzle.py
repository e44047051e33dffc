import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_kernels.dispatch import kernel


@kernel("swizzle_scales", backend="reference")
def swizzle_scales(scales: Tensor, out: Tensor) -> None:
    rows, columns = out.shape[-2:]
    padded = pad(scales.view(torch.uint8), (0, columns - scales.shape[-1], 0, rows - scales.shape[-2]))
    tiles = padded.unflatten(-1, (columns // 4, 4)).unflatten(-3, (rows // 128, 4, 32))
    # [.., row tile, row//32, row%32, column tile, column%4] -> [.., row tile, column tile, row%32, row//32, column%4]
    out.view(torch.uint8).copy_(tiles.movedim((-2, -3), (-4, -3)).reshape(out.shape))


@kernel("unswizzle_scales", backend="reference")
def unswizzle_scales(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
    padded_rows, padded_columns = swizzled.shape[-2:]
    batch = swizzled.shape[:-2]
    tiles = swizzled.contiguous().view(torch.uint8)
    tiles = tiles.reshape(*batch, padded_rows // 128, padded_columns // 4, 32, 4, 4)
    linear = tiles.movedim((-4, -3), (-2, -3)).reshape(*batch, padded_rows, padded_columns)
    out.view(torch.uint8).copy_(linear[..., :rows, :columns])
