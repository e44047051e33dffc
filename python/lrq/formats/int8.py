"""INT8, optionally rotated by a grouped Hadamard matrix (docs/FORMATS.md sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import lrq_kernels
from lrq.formats.format import Shape, Tensors
from lrq.formats.grid import INT8, Grid
from lrq.formats.scaled import Scaled, block_side, loader_of

MARKERS = {"tensor": "int8_tensorwise", "row": "int8_tensorwise", "block": "int8_blockwise"}


@dataclass(frozen=True)
class Int8(Scaled):
    """Symmetric integer codes, a float32 scale for the matrix, a row or a square block."""

    grid: ClassVar[Grid] = INT8

    convrot: int = 0
    """Columns of one Hadamard group, a power of 4; 0: no rotation. Row scaling only."""

    @property
    def name(self) -> str:
        return f"int8-{self.scaling}" + (f"-convrot{self.convrot}" if self.convrot else "")

    @property
    def plain_weight(self) -> float:
        return 0.8 if self._is_fine else super().plain_weight

    @property
    def top_p(self) -> float:
        # The error by row is so small that many directions mislead where a text encoder's inputs have others.
        return 0.05 if self._is_fine else super().top_p

    @property
    def spectrum(self) -> float:
        return 0.75 if self._is_fine else super().spectrum

    @property
    def _is_fine(self) -> bool:
        return self.scaling == "row" and not self.convrot

    @property
    def loader(self) -> str:
        return loader_of(("tensor", "row"), self.scaling)

    def refusal(self, shape: Shape) -> str | None:
        if self.convrot and len(shape) == 3:
            return "ComfyUI drops ConvRot from expert banks"
        if self.convrot and shape[-1] % self.convrot:
            return f"K must be a multiple of the ConvRot group {self.convrot}, got {shape[-1]}"
        return super().refusal(shape)

    def marker(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"format": MARKERS[self.scaling]}
        if self.scaling == "block":
            keys["group_size"] = self.block
        if self.convrot:
            keys |= {"convrot": True, "convrot_groupsize": self.convrot}
        return keys

    def prepare(self, w: Tensor) -> Tensor:
        return lrq_kernels.rotate_hadamard(w, self.convrot) if self.convrot else w.float()

    def quantize(self, w: Tensor, coherence: float | None, matrix_scale: Tensor | None = None) -> Tensors:
        codes, scale = lrq_kernels.quantize_int8(w, self.scaling, self.block, matrix_scale, self.convrot)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, tensors: Tensors, shape: Shape) -> Tensor:
        return lrq_kernels.dequantize_int8(tensors["weight"], tensors["weight_scale"], self.convrot)

    def with_codes(self, tensors: Tensors, values: Tensor) -> Tensors:
        return {**tensors, "weight": values.to(torch.int8)}

    @classmethod
    def read(cls, marker: dict[str, Any], tensors: dict[str, Shape]) -> Int8:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        if marker["format"] == "int8_blockwise":
            return cls("block", block_side(weight, scale))
        group = marker.get("convrot_groupsize", 256) if marker.get("convrot") else 0
        if type(group) is not int:
            raise ValueError(f"convrot_groupsize must be an integer, got {group!r}")
        return cls("row" if len(scale) == len(weight) else "tensor", 0, group)
