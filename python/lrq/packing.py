"""Weights packed and unpacked as tensors: the library call for other tools."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import lrq_kernels


class Nvfp4Weight(NamedTuple):
    """NVFP4 as ComfyUI stores it; the fields are named as the tensors in the file."""

    weight: Tensor
    """uint8 [..,16*ceil(N/16),8*ceil(K/16)], the even column in the high nibble."""
    weight_scale: Tensor
    """float8_e4m3fn, swizzled, one scale for 16 columns."""
    weight_scale_2: Tensor
    """float32 [] or [B]."""


class Mxfp8Weight(NamedTuple):
    """MXFP8 as ComfyUI stores it."""

    weight: Tensor
    """float8_e4m3fn [..,32*ceil(N/32),32*ceil(K/32)]."""
    weight_scale: Tensor
    """uint8 (E8M0), swizzled, one scale for 32 columns."""


class Fp8Weight(NamedTuple):
    """FP8 E4M3."""

    weight: Tensor
    """float8_e4m3fn [..,N,K]."""
    weight_scale: Tensor
    """float32 [..] (tensor), [..,N] (row) or [..,N/b,K/b] (block)."""


class Int8Weight(NamedTuple):
    """Symmetric INT8."""

    weight: Tensor
    """int8 [..,N,K]."""
    weight_scale: Tensor
    """float32 [..] (tensor), [..,N,1] (row) or [..,N/b,K/b] (block)."""


def pack_nvfp4(w: Tensor, *, tensor_scale: Tensor | None = None, coherence: float | None = 4.0) -> Nvfp4Weight:
    """Quantize a weight to NVFP4, ready to be stored.

    Args:
        w: [N,K] or [B,N,K], float32, bfloat16 or float16, finite.
        tensor_scale: float32 [] or [B]; ``amax/(448*6)`` if absent.
        coherence: γ of the best-scale search, which minimises ``|E|^2 + γ <E,W>^2/|W|^2`` in every block of 16;
            None: scales from each block's amax, as comfy-kitchen does.

    Equivalent to (``coherence=None``, N and K multiples of 16)::

        scale_2 = w.abs().max().float() / (448 * 6)
        blocks = w.float().unflatten(-1, (-1, 16))
        scale = (blocks.abs().amax(-1) / 6 / scale_2).clamp(max=448).to(torch.float8_e4m3fn)
        codes = e2m1_codes((blocks / (scale_2 * scale.float())[..., None]).clamp(-6, 6)).flatten(-2)
        weight, weight_scale, weight_scale_2 = codes[:, ::2] << 4 | codes[:, 1::2], swizzle(scale), scale_2
    """
    return Nvfp4Weight(*lrq_kernels.quantize_nvfp4(w, tensor_scale, coherence))


def unpack_nvfp4(packed: Nvfp4Weight, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`pack_nvfp4`: the ``dtype`` [..,rows,columns] weight without padding.

    Equivalent to::

        (e2m1_values(codes) * (weight_scale_2 * unswizzle(weight_scale).float())).to(dtype)
    """
    return lrq_kernels.dequantize_nvfp4(*packed, rows, columns, dtype)


def pack_mxfp8(w: Tensor, *, coherence: float | None = 4.0) -> Mxfp8Weight:
    """Quantize a weight to MXFP8, ready to be stored.

    Args:
        w: [N,K] or [B,N,K], float32, bfloat16 or float16, finite.
        coherence: γ of the best-scale search (see :func:`pack_nvfp4`), in every block of 32; None: the scale is the
            smallest power of two that saturates nothing.

    Equivalent to (``coherence=None``, N and K multiples of 32)::

        blocks = w.float().unflatten(-1, (-1, 32))
        exponent = torch.ceil(torch.log2(blocks.abs().amax(-1) / 448))    # exact from the bits
        weight = (blocks / 2**exponent[..., None]).to(torch.float8_e4m3fn).flatten(-2)
        weight_scale = swizzle((exponent + 127).to(torch.uint8))
    """
    return Mxfp8Weight(*lrq_kernels.quantize_mxfp8(w, coherence))


def unpack_mxfp8(packed: Mxfp8Weight, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`pack_mxfp8`: the ``dtype`` [..,rows,columns] weight without padding.

    Equivalent to::

        (weight.float() * 2.0 ** (unswizzle(weight_scale) - 127)).to(dtype)
    """
    return lrq_kernels.dequantize_mxfp8(*packed, rows, columns, dtype)


def pack_fp8(w: Tensor, *, scaling: str = "tensor", block: int = 64, scale: Tensor | None = None) -> Fp8Weight:
    """Quantize a weight to FP8 E4M3.

    Args:
        w: [N,K] or [B,N,K], float32, bfloat16 or float16, finite.
        scaling: ``tensor``, ``row`` or ``block``: what shares one scale.
        block: side of the square block; it divides N and K.
        scale: float32 [] or [B], for ``tensor``; ``amax/448`` if absent.

    Equivalent to (tensor)::

        weight_scale = w.abs().max().float() / 448
        weight = (w.float() / weight_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    """
    return Fp8Weight(*lrq_kernels.quantize_fp8(w, scaling, block, scale))


def unpack_fp8(packed: Fp8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`pack_fp8`: ``dtype`` [..,N,K].

    Equivalent to (tensor)::

        (weight.float() * weight_scale).to(dtype)
    """
    return lrq_kernels.dequantize_fp8(*packed, dtype)


def pack_int8(
    w: Tensor, *, scaling: str = "tensor", block: int = 128, scale: Tensor | None = None, hadamard: int = 0
) -> Int8Weight:
    """Quantize a weight to symmetric INT8.

    Args:
        w: [N,K] or [B,N,K], float32, bfloat16 or float16, finite.
        scaling: ``tensor``, ``row`` or ``block``: what shares one scale.
        block: side of the square block; it divides N and K.
        scale: float32 [] or [B], for ``tensor``; ``amax/127`` if absent.
        hadamard: rotate groups of this many columns first (ConvRot), a power of 4 that divides K; 0: no rotation.

    Equivalent to (row)::

        weight_scale = (w.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)
        weight = (w.float() / weight_scale).round().to(torch.int8)
    """
    return Int8Weight(*lrq_kernels.quantize_int8(w, scaling, block, scale, hadamard))


def unpack_int8(packed: Int8Weight, dtype: torch.dtype = torch.float32, *, hadamard: int = 0) -> Tensor:
    """Inverse of :func:`pack_int8`: ``dtype`` [..,N,K].

    Equivalent to (row)::

        (weight.float() * weight_scale).to(dtype)
    """
    return lrq_kernels.dequantize_int8(*packed, hadamard, dtype)
