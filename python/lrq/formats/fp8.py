"""FP8 E4M3 (docs/FORMATS.md sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import lrq_kernels
from lrq.formats.format import Shape, Tensors
from lrq.formats.grid import E4M3, Grid
from lrq.formats.scaled import Scaled, block_side, loader_of
from lrq_kernels.minifloat import encode_e4m3

MARKERS = {"tensor": "float8_e4m3fn", "row": "float8_e4m3fn_rowwise", "block": "float8_e4m3fn_blockwise"}


@dataclass(frozen=True)
class Fp8(Scaled):
    """E4M3 codes, a float32 scale for the matrix, a row or a square block."""

    grid: ClassVar[Grid] = E4M3

    @property
    def name(self) -> str:
        return "fp8" if self.scaling == "tensor" else f"fp8-{self.scaling}"

    @property
    def plain_weight(self) -> float:
        return 1.5

    @property
    def spectrum(self) -> float:
        return 0.5

    @property
    def loader(self) -> str:
        return loader_of(("tensor",), self.scaling)

    def marker(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"format": MARKERS[self.scaling]}
        return keys | {"group_size": self.block} if self.scaling == "block" else keys

    def quantize(self, w: Tensor, coherence: float | None, matrix_scale: Tensor | None = None) -> Tensors:
        codes, scale = lrq_kernels.quantize_fp8(w, self.scaling, self.block, matrix_scale)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, tensors: Tensors, shape: Shape) -> Tensor:
        return lrq_kernels.dequantize_fp8(tensors["weight"], tensors["weight_scale"])

    def with_codes(self, tensors: Tensors, values: Tensor) -> Tensors:
        return {**tensors, "weight": encode_e4m3(values)}

    @classmethod
    def read(cls, marker: dict[str, Any], tensors: dict[str, Shape]) -> Fp8:
        scaling = {name: scaling for scaling, name in MARKERS.items()}[marker["format"]]
        return cls(scaling, block_side(tensors["weight"], tensors["weight_scale"]) if scaling == "block" else 0)
