"""Two 4-bit codes in one byte."""

import torch
from torch import Tensor

from lrq_kernels.contract import check_matrix, operation


@operation
def pack_fp4(codes: Tensor, high_first: bool = True) -> Tensor:
    """Pack 4-bit codes, two neighbours of a row in one byte.

    Args:
        codes: uint8 [M,N] or [B,M,N], N even; only the low four bits of each are used.
        high_first: the even column goes to the HIGH nibble (ComfyUI); False: to the low one (vLLM, ModelOpt).

    Returns:
        uint8 [..,M,N/2].

    Raises:
        ValueError: N is odd.

    Equivalent to (``high_first``)::

        codes[..., 0::2] << 4 | codes[..., 1::2] & 15
    """
    check_matrix("codes", codes, (torch.uint8,))
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: N must be even, got {codes.shape[-1]}")
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 2))


@operation
def unpack_fp4(packed: Tensor, high_first: bool = True) -> Tensor:
    """Inverse of :func:`pack_fp4`: uint8 [..,M,N/2] to uint8 codes [..,M,N], each 0 to 15.

    Equivalent to (``high_first``)::

        torch.stack((packed >> 4, packed & 15), -1).flatten(-2)
    """
    check_matrix("packed", packed, (torch.uint8,))
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2))
