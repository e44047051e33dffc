"""What a format is: a grid, a rule for scales, the tensors it stores and the marker that names it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrq.formats.grid import Grid

Tensors = dict[str, Tensor]
"""Stored tensors of one layer by suffix: ``weight``, ``weight_scale``, ..."""
Shape = tuple[int, ...]

TOP_P = 0.4
"""Of learned rounding by default: the share of directions whose error counts extra."""
STOCK = "stock ComfyUI"
QUANTOPS = "ComfyUI with the custom node ComfyUI-QuantOps"


@dataclass(frozen=True)
class Format(ABC):
    """One storage format. Weights are [N,K] or, for expert banks, [E,N,K]; the stored tensors lead with E too."""

    marker_name: ClassVar[str]
    """The ``format`` string of the marker."""
    grid: ClassVar[Grid]
    has_scale_search: ClassVar[bool] = False
    """Whether :meth:`quantize` can search block scales."""
    last_scale: ClassVar[int] = 0
    """The largest code of a block scale, of a format with a scale search."""
    scale_reach: ClassVar[range] = range(0)
    """Codes of block scales that are tried under statistics of the inputs, counted from the block's own."""
    has_fine_scales: ClassVar[bool] = False
    """Whether neighbouring block scales are so close that a solver gains by choosing among them itself."""

    tile_rows: ClassVar[int] = 1
    """Rows of a part of a weight that is quantized by itself come in multiples of this."""

    @property
    def matrix_scale(self) -> str | None:
        """Suffix of the scale that hangs on all weights of a matrix, or None: its rows are independent."""
        return None

    def scale_of_matrix(self, largest: Tensor) -> Tensor:
        """The :attr:`matrix_scale` of a matrix whose largest magnitude is ``largest`` []: that of this one weight."""
        assert self.matrix_scale is not None
        return self.quantize(largest.float().view(1, 1), None)[self.matrix_scale]

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for people: ``nvfp4``, ``int8-row``, ..."""

    @property
    def loader(self) -> str:
        """Who loads the file."""
        return STOCK

    @property
    def plain_weight(self) -> float:
        """λ of learned rounding by default, chosen by the output of real models."""
        return 3.0

    @property
    def top_p(self) -> float:
        """The share of singular directions whose error counts extra by default, chosen likewise."""
        return TOP_P

    @property
    def spectrum(self) -> float:
        """The power of a singular value by which its input direction counts by default, chosen likewise."""
        return 1.0

    def refusal(self, shape: Shape) -> str | None:
        """Why a weight of this shape can't be stored, or None."""
        return None

    @abstractmethod
    def block_shape(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of the prepared weight that share a scale."""

    def marker(self) -> dict[str, Any]:
        """The keys of the layer's marker."""
        return {"format": self.marker_name}

    def prepare(self, w: Tensor) -> Tensor:
        """The float32 matrix that is rounded: the weight, or its rotation."""
        return w.float()

    @abstractmethod
    def quantize(self, w: Tensor, coherence: float | None, matrix_scale: Tensor | None = None) -> Tensors:
        """Round to nearest; ``coherence`` = γ of the scale search where there is one, None: scales from amax.

        ``matrix_scale`` is the scale of the whole matrix where ``w`` is only some of its rows.

        Works on meta tensors too: the result's shapes and dtypes are the layout in the file.
        """

    @abstractmethod
    def expand(self, tensors: Tensors, shape: Shape) -> tuple[Tensor, Tensor]:
        """Stored tensors to (grid values, scales), float32, of the prepared weight.

        Grid values are [..,N,K] without padding; the scales broadcast against them.
        """

    @abstractmethod
    def with_codes(self, tensors: Tensors, values: Tensor) -> Tensors:
        """The same scales with other grid values [..,N,K]."""

    def scale_codes(self, tensors: Tensors, shape: Shape) -> Tensor:
        """Codes of the block scales, int32 [..,N,blocks], of a format with a scale search; 0 is a scale of zero."""
        raise NotImplementedError

    def scales_of(self, codes: Tensor, tensors: Tensors) -> Tensor:
        """What the codes of block scales stand for, float32; a larger code is a larger scale."""
        raise NotImplementedError

    def with_scale_codes(self, tensors: Tensors, codes: Tensor) -> Tensors:
        """The same grid values with other block scales."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def read(cls, marker: dict[str, Any], tensors: dict[str, Shape]) -> Format:
        """The format of a stored layer from its marker and the shapes of its tensors.

        Raises:
            ValueError: the marker does not describe them.
        """

    @abstractmethod
    def dequantize(self, tensors: Tensors, shape: Shape) -> Tensor:
        """The weight that the stored tensors stand for, float32 [..,N,K]."""

    def layout(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """dtype and shape of every stored tensor of a weight of this shape."""
        stored = self.quantize(torch.empty(shape, device="meta"), None)
        return {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()}
