"""NVFP4 (docs/FORMATS.md sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

import lrq_kernels
from lrq.formats.format import Format, Shape, Tensors
from lrq.formats.grid import E2M1, Grid
from lrq_kernels.minifloat import decode_e2m1, decode_e4m3, encode_e2m1

BLOCK = 16


@dataclass(frozen=True)
class Nvfp4(Format):
    """E2M1 codes, an E4M3 scale for 16 columns, a float32 scale for the matrix."""

    marker_name: ClassVar[str] = "nvfp4"
    grid: ClassVar[Grid] = E2M1
    tile_rows: ClassVar[int] = 128
    has_scale_search: ClassVar[bool] = True
    last_scale: ClassVar[int] = 126
    scale_reach: ClassVar[range] = range(-8, 7)
    has_fine_scales: ClassVar[bool] = True

    @property
    def matrix_scale(self) -> str | None:
        return "weight_scale_2"

    @property
    def name(self) -> str:
        return "nvfp4"

    def block_shape(self, shape: Shape) -> tuple[int, int]:
        return 1, BLOCK

    def quantize(self, w: Tensor, coherence: float | None, matrix_scale: Tensor | None = None) -> Tensors:
        codes, block_scales, tensor_scale = lrq_kernels.quantize_nvfp4(w, matrix_scale, coherence)
        return {"weight": codes, "weight_scale": block_scales, "weight_scale_2": tensor_scale}

    def expand(self, tensors: Tensors, shape: Shape) -> tuple[Tensor, Tensor]:
        rows, columns = shape[-2:]
        codes = lrq_kernels.unpack_fp4(tensors["weight"])
        scales = lrq_kernels.unswizzle_scales(tensors["weight_scale"], codes.shape[-2], codes.shape[-1] // BLOCK)
        total = tensors["weight_scale_2"][..., None, None] * scales.float()
        values = decode_e2m1(codes[..., :rows, :columns])
        return values, total[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]

    def dequantize(self, tensors: Tensors, shape: Shape) -> Tensor:
        stored = tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"]
        return lrq_kernels.dequantize_nvfp4(*stored, *shape[-2:])

    def with_codes(self, tensors: Tensors, values: Tensor) -> Tensors:
        stored = tensors["weight"]
        missing = (0, stored.shape[-1] * 2 - values.shape[-1], 0, stored.shape[-2] - values.shape[-2])
        return {**tensors, "weight": lrq_kernels.pack_fp4(pad(encode_e2m1(values), missing))}

    def scale_codes(self, tensors: Tensors, shape: Shape) -> Tensor:
        rows, columns = shape[-2:]
        stored = tensors["weight"]
        scales = lrq_kernels.unswizzle_scales(tensors["weight_scale"], stored.shape[-2], stored.shape[-1] * 2 // BLOCK)
        return scales.view(torch.uint8)[..., :rows, : -(-columns // BLOCK)].int()

    def scales_of(self, codes: Tensor, tensors: Tensors) -> Tensor:
        return tensors["weight_scale_2"][..., None, None] * decode_e4m3(codes)

    def with_scale_codes(self, tensors: Tensors, codes: Tensor) -> Tensors:
        stored = tensors["weight"]
        missing = (0, stored.shape[-1] * 2 // BLOCK - codes.shape[-1], 0, stored.shape[-2] - codes.shape[-2])
        scales = pad(codes.to(torch.uint8), missing).view(torch.float8_e4m3fn)
        return {**tensors, "weight_scale": lrq_kernels.swizzle_scales(scales)}

    @classmethod
    def read(cls, marker: dict[str, Any], tensors: dict[str, Shape]) -> Nvfp4:
        return cls()
