"""Against comfy-kitchen's eager code: bit for bit where it is exact for float32 input, and why not where it is not."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.float_utils import from_blocked, pack_uint4, to_blocked
from torch import Tensor

import lrq_kernels
import tolerances
from samples import MATRICES, gaussian

FLAT = {name: w for name, w in MATRICES.items() if w.dim() == 2}
EXACT = {name: w for name, w in FLAT.items() if name not in ("zeros", "negative zeros", "below every scale")}
"""Where comfy-kitchen does not divide by a zero scale."""


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", EXACT)
def test_nvfp4(name: str) -> None:
    w = EXACT[name]
    codes, scales, tensor_scale = lrq_kernels.quantize_nvfp4(w)
    amax = w.float().abs().max()
    assert tensor_scale == amax / (448 * 6)
    theirs, their_scales = kitchen.quantize_nvfp4(w.float(), tensor_scale, pad_16x=True)
    assert same(codes, theirs) and same(scales, their_scales)
    if codes.shape == (w.shape[0], w.shape[1] // 2):
        ours = lrq_kernels.dequantize_nvfp4(codes, scales, tensor_scale, *w.shape)
        assert torch.equal(ours, kitchen.dequantize_nvfp4(theirs, tensor_scale, their_scales, torch.float32))


MXFP8_EXACT = [name for name in FLAT if name not in ("tiny", "subnormal", "below every scale", "just above 448 * 2^k")]


@pytest.mark.parametrize("name", MXFP8_EXACT)
def test_mxfp8(name: str) -> None:
    w = FLAT[name].float()
    codes, scales = lrq_kernels.quantize_mxfp8(w)
    theirs, their_scales = kitchen.quantize_mxfp8(w, pad_32x=True)
    assert same(codes, theirs) and same(scales, their_scales)
    if codes.shape == w.shape:
        assert torch.equal(
            lrq_kernels.dequantize_mxfp8(codes, scales, *w.shape),
            kitchen.dequantize_mxfp8(theirs, their_scales, torch.float32),
        )


def test_mxfp8_just_above_a_power_of_two() -> None:
    """Kitchen takes ceil(log2()) in float32, which misses the last bits: its block saturates, ours does not."""
    w = FLAT["just above 448 * 2^k"]
    exponents = lrq_kernels.unswizzle_scales(lrq_kernels.quantize_mxfp8(w)[1], 32, 2)[:16]
    exact = torch.ceil(torch.log2(w.double().unflatten(-1, (-1, 32)).abs().amax(-1) / 448)) + 127
    # float64 sees the last bit of a float32: one step above 2^k is no power of two.
    assert torch.equal(exponents.double(), exact)
    theirs = from_blocked(kitchen.quantize_mxfp8(w)[1].view(torch.uint8), 16, 2)
    assert (theirs.double() < exact).all()


def test_mxfp8_below_the_smallest_exponent() -> None:
    """Kitchen clamps the exponent to 0, which its own decoder reads as scale 0; here such a block is zero outright."""
    w = torch.full((32, 32), 1e-37)
    codes, scales = lrq_kernels.quantize_mxfp8(w)
    assert not codes.view(torch.uint8).any() and not scales.any()
    theirs, their_scales = kitchen.quantize_mxfp8(w)
    assert not kitchen.dequantize_mxfp8(theirs, their_scales, torch.float32).any()


def test_nvfp4_all_zero() -> None:
    """Kitchen's rule divides by amax = 0 and writes NaN; here the scale is 1 and everything else 0."""
    codes, scales, tensor_scale = lrq_kernels.quantize_nvfp4(torch.zeros(16, 64))
    assert tensor_scale == 1 and not codes.any() and not scales.view(torch.uint8).any()
    theirs = kitchen.quantize_nvfp4(torch.zeros(16, 64), torch.tensor(0.0))[1]
    assert theirs.float().isnan().any()


@pytest.mark.parametrize("name", FLAT)
def test_fp8_dequantize_and_codes(name: str) -> None:
    """Kitchen multiplies by the reciprocal of the scale, which rounds twice: a few codes are the other neighbour."""
    w = FLAT[name].float()
    codes, scale = lrq_kernels.quantize_fp8(w)
    assert torch.equal(
        lrq_kernels.dequantize_fp8(codes, scale), kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    )
    if scale > 1e-37:  # below, 1/scale overflows in kitchen
        theirs = kitchen.quantize_per_tensor_fp8(w.clone(), scale)
        different = codes.view(torch.uint8) != theirs.view(torch.uint8)
        assert different.float().mean() <= tolerances.KITCHEN_FP8_RECIPROCAL
    exact = (w.double() / scale.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    assert same(codes, exact)


@pytest.mark.parametrize("name", FLAT)
def test_int8(name: str) -> None:
    w = FLAT[name].float()
    for scaling, theirs in (("row", kitchen.quantize_int8_rowwise(w)), ("tensor", kitchen.quantize_int8_tensorwise(w))):
        codes, scale = lrq_kernels.quantize_int8(w, scaling)
        assert same(codes, theirs[0]) and torch.equal(scale, theirs[1])
        assert torch.equal(lrq_kernels.dequantize_int8(codes, scale), kitchen.dequantize_int8_simple(codes, scale))


def test_int8_of_bfloat16() -> None:
    """Kitchen divides in bfloat16: some bytes differ, and its error is larger."""
    w = gaussian(256, 512).bfloat16()
    codes, scale = lrq_kernels.quantize_int8(w, "row")
    theirs, their_scale = kitchen.quantize_int8_rowwise(w)
    assert torch.equal(scale, their_scale)
    assert 0 < (codes != theirs).float().mean() <= tolerances.KITCHEN_BFLOAT16_INT8
    error = lambda q: (q.float() * scale - w.float()).norm()  # noqa: E731
    assert error(codes) < error(theirs)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_hadamard(group: int) -> None:
    """The butterfly adds in another order than kitchen's matrix product; the matrix is the same one."""
    w = gaussian(20, 512)
    ours = lrq_kernels.rotate_hadamard(w, group)
    theirs = kitchen._rotate_weight(w, kitchen._build_hadamard(group), group)
    assert (ours - theirs).abs().max() <= tolerances.HADAMARD_AGAINST_MATMUL * w.abs().max()
    identity = lrq_kernels.rotate_hadamard(torch.eye(group), group)
    assert torch.equal(identity, kitchen._build_hadamard(group))


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 6), (300, 9)])
def test_swizzle(shape: tuple[int, int]) -> None:
    scales = torch.randint(1, 120, shape, dtype=torch.uint8)
    swizzled = lrq_kernels.swizzle_scales(scales)
    assert torch.equal(swizzled, to_blocked(scales, flatten=False))
    assert torch.equal(lrq_kernels.unswizzle_scales(swizzled, *shape), scales)


@pytest.mark.parametrize("high_first", [True, False])
def test_packing(high_first: bool) -> None:
    codes = torch.randint(0, 16, (5, 32), dtype=torch.uint8)
    packed = lrq_kernels.pack_fp4(codes, high_first)
    assert torch.equal(packed, pack_uint4(codes, hi_first=high_first))
    assert torch.equal(lrq_kernels.unpack_fp4(packed, high_first), codes)


def test_nibbles_and_ties_of_the_contract() -> None:
    """Codes 1,2,3,4 become bytes 0x12 0x34; ties go to the even code."""
    assert lrq_kernels.pack_fp4(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)).tolist() == [[0x12, 0x34]]
    w = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, 0, 0, 0, 0, 0, 0, 0]])
    codes = lrq_kernels.unpack_fp4(lrq_kernels.quantize_nvfp4(w, torch.tensor(1.0))[0])[0, :9]
    assert codes.tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8]
