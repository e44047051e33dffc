"""MXFP8 (docs/FORMATS.md sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

import lrq_kernels
from lrq.formats.format import Format, Shape, Tensors
from lrq.formats.grid import E4M3, Grid
from lrq_kernels.minifloat import encode_e4m3, power_of_two

BLOCK = 32


@dataclass(frozen=True)
class Mxfp8(Format):
    """E4M3 codes, a power-of-two (E8M0) scale for 32 columns."""

    marker_name: ClassVar[str] = "mxfp8"
    grid: ClassVar[Grid] = E4M3
    tile_rows: ClassVar[int] = 128
    has_scale_search: ClassVar[bool] = True
    last_scale: ClassVar[int] = 254
    scale_reach: ClassVar[range] = range(-2, 2)

    @property
    def name(self) -> str:
        return "mxfp8"

    @property
    def plain_weight(self) -> float:
        return 1.5

    @property
    def spectrum(self) -> float:
        return 0.5

    def block_shape(self, shape: Shape) -> tuple[int, int]:
        return 1, BLOCK

    def quantize(self, w: Tensor, coherence: float | None, matrix_scale: Tensor | None = None) -> Tensors:
        codes, block_scales = lrq_kernels.quantize_mxfp8(w, coherence)
        return {"weight": codes, "weight_scale": block_scales}

    def expand(self, tensors: Tensors, shape: Shape) -> tuple[Tensor, Tensor]:
        rows, columns = shape[-2:]
        codes = tensors["weight"]
        exponents = lrq_kernels.unswizzle_scales(tensors["weight_scale"], codes.shape[-2], codes.shape[-1] // BLOCK)
        # Byte 0 marks a zero block: no code of it may become anything but zero.
        scale = power_of_two(exponents.int()).masked_fill(exponents == 0, 0.0)
        return codes[..., :rows, :columns].float(), scale[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]

    def dequantize(self, tensors: Tensors, shape: Shape) -> Tensor:
        return lrq_kernels.dequantize_mxfp8(tensors["weight"], tensors["weight_scale"], *shape[-2:])

    def with_codes(self, tensors: Tensors, values: Tensor) -> Tensors:
        stored = tensors["weight"]
        missing = (0, stored.shape[-1] - values.shape[-1], 0, stored.shape[-2] - values.shape[-2])
        return {**tensors, "weight": encode_e4m3(pad(values, missing))}

    def scale_codes(self, tensors: Tensors, shape: Shape) -> Tensor:
        rows, columns = shape[-2:]
        stored = tensors["weight"]
        exponents = lrq_kernels.unswizzle_scales(tensors["weight_scale"], stored.shape[-2], stored.shape[-1] // BLOCK)
        return exponents[..., :rows, : -(-columns // BLOCK)].int()

    def scales_of(self, codes: Tensor, tensors: Tensors) -> Tensor:
        return power_of_two(codes).masked_fill(codes == 0, 0.0)

    def with_scale_codes(self, tensors: Tensors, codes: Tensor) -> Tensors:
        stored = tensors["weight"]
        missing = (0, stored.shape[-1] // BLOCK - codes.shape[-1], 0, stored.shape[-2] - codes.shape[-2])
        return {**tensors, "weight_scale": lrq_kernels.swizzle_scales(pad(codes.to(torch.uint8), missing))}

    @classmethod
    def read(cls, marker: dict[str, Any], tensors: dict[str, Shape]) -> Mxfp8:
        return cls()
