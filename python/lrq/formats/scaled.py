"""FP8 and INT8 share their scaling: one float32 scale for the matrix, a row or a square block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lrq.formats.format import QUANTOPS, STOCK, Format, Shape, Tensors
from lrq_kernels.ops.scaling import expand_scale


@dataclass(frozen=True)
class Scaled(Format):
    """A format whose scales are float32 by tensor, row or square block."""

    scaling: str = "tensor"
    """``tensor``, ``row`` or ``block``."""
    block: int = 0
    """Side of the square block; 0 unless ``scaling`` is ``block``."""

    @property
    def tile_rows(self) -> int:  # type: ignore[override]
        return self.block if self.scaling == "block" else 1

    @property
    def matrix_scale(self) -> str | None:
        return "weight_scale" if self.scaling == "tensor" else None

    def refusal(self, shape: Shape) -> str | None:
        if self.scaling == "block" and (shape[-2] % self.block or shape[-1] % self.block):
            return f"N and K must be multiples of the block {self.block}, got {shape[-2]} x {shape[-1]}"
        return None

    def block_shape(self, shape: Shape) -> tuple[int, int]:
        rows, columns = shape[-2:]
        return {"tensor": (rows, columns), "row": (1, columns), "block": (self.block, self.block)}[self.scaling]

    def expand(self, tensors: Tensors, shape: Shape) -> tuple[Tensor, Tensor]:
        values = tensors["weight"].float()
        return values, expand_scale(tensors["weight_scale"], values.shape)


def loader_of(stock_scalings: tuple[str, ...], scaling: str) -> str:
    """Stock ComfyUI reads ``stock_scalings`` only."""
    return STOCK if scaling in stock_scalings else QUANTOPS


def block_side(weight: Shape, scale: Shape) -> int:
    """Side of the square block from the shapes of weight and scale.

    Raises:
        ValueError: the scale does not divide the weight into square blocks.
    """
    side = weight[-2] // scale[-2] if len(scale) == len(weight) and scale[-2] else 0
    if side < 1 or (scale[-2] * side, scale[-1] * side) != tuple(weight[-2:]):
        raise ValueError(f"weight_scale {list(scale)} does not divide weight {list(weight)} into square blocks")
    return side
