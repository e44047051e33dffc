from torch import Tensor

from lrq_kernels.dispatch import kernel


@kernel("pack_fp4", backend="reference")
def pack_fp4(codes: Tensor, high_first: bool, out: Tensor) -> None:
    even, odd = codes[..., 0::2] & 15, codes[..., 1::2] & 15
    high, low = (even, odd) if high_first else (odd, even)
    out.copy_(high << 4 | low)


@kernel("unpack_fp4", backend="reference")
def unpack_fp4(packed: Tensor, high_first: bool, out: Tensor) -> None:
    high, low = packed >> 4, packed & 15
    even, odd = (high, low) if high_first else (low, high)
    out[..., 0::2] = even
    out[..., 1::2] = odd
