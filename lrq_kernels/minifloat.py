"""E2M1, E4M3 and E8M0 numbers in plain PyTorch, exact on every device (csrc/minifloat.h is the same for C++)."""

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
LAST_EXPONENT = 254
"""Of E8M0, and of float32."""


def nearest_e2m1(y: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to even, saturating; float32, the sign of zero kept."""
    magnitude = y.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, y)


_E4M3_OF_E2M1 = 64.0
"""E4M3 has two more bits of each kind and a bias larger by 6: the bits of an E2M1 value, two places up, are those of an
E4M3 value 2^6 times smaller."""


def encode_e2m1(q: Tensor) -> Tensor:
    """Code of E2M1 values: sign, two exponent bits, one mantissa bit."""
    wide = (q / _E4M3_OF_E2M1).to(torch.float8_e4m3fn).view(torch.uint8)
    return wide >> 2 & 7 | wide >> 4 & 8


def decode_e2m1(codes: Tensor) -> Tensor:
    """Value of E2M1 codes, float32."""
    wide = (codes & 7) << 2 | (codes & 8) << 4
    return wide.view(torch.float8_e4m3fn).float().mul_(_E4M3_OF_E2M1)


def encode_e4m3(y: Tensor) -> Tensor:
    """Nearest E4M3 value, ties to even, saturating."""
    return y.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Value of E4M3 codes given as integers, float32."""
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^(exponent - 127)`` for biased (E8M0) exponents 0 to 254, exact, float32."""
    bits = torch.where(exponent > 0, exponent << 23, 1 << 22)
    return bits.int().view(torch.float32)
