"""A layer cut by rows, or a bank by experts, so that what is in memory fits; the stored bytes are the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lrq.checkpoint.header import tensor_size
from lrq.checkpoint.reader import CODES
from lrq.config import Rounding
from lrq.formats import Format, Shape
from lrq.rounding.solve import solver_of
from lrq.selection.layer import Layer

LEARNING = {"discrete": 19, "coordinate_descent": 28, "gptq": 40}
RELAXING = 48
"""Bytes that learned rounding holds of a weight, by solver, as measured; the eigenvectors come on top."""
WEIGHING = 28
"""The same of simple rounding whose block scales follow statistics."""
ABSORBING = 20
"""Bytes of a weight while the error of the outputs is found."""
EIGENVECTORS = 8
"""Bytes of an element of the smaller side's Gram matrix, for its eigenvectors."""
SECOND_MOMENTS = 40
"""Bytes of an element of E[xx'], while it is factored in float64."""
PLAIN, PLAIN_SEARCH, PLAIN_LEARNING = 16, 26, 44
"""Bytes more of a weight where no kernel computes but PyTorch, step by step: without a search of scales, with one,
and learned."""
TRIED = 24 << 20
"""Bytes of the blocks whose scales are tried at a time."""
WIDE, WIDE_ROW = 1 << 16, 40
"""Columns beyond which the float32 copies of a row that kernels work on count, and their bytes a column and thread."""
SMALL = 1 << 20
"""Bytes that every layer needs besides its tensors."""


@dataclass(frozen=True)
class Tile:
    """Rows of a weight [N,K], or experts of a bank [E,N,K]."""

    layer: Layer
    begin: int
    end: int
    plain: bool = False
    """Whether PyTorch computes it without kernels."""

    @property
    def shape(self) -> Shape:
        """Of this part of the weight."""
        return (self.end - self.begin, *self.layer.source.shape[1:])

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the layer."""
        return self.shape == self.layer.source.shape

    @property
    def source_range(self) -> tuple[int, int]:
        """First byte in the source's tensor, and bytes."""
        row = self.layer.source.size // self.layer.source.shape[0]
        return self.begin * row, (self.end - self.begin) * row

    def places(self) -> dict[str, int]:
        """By suffix, where in the stored tensor this tile's bytes begin; without those that an earlier tile wrote.

        Rows are stored one after the other, swizzled scales in groups of 128 rows: a tile begins where the layout of
        the rows before it ends.
        """
        tail = self.layer.source.shape[1:]
        whole = self.layer.format.layout(self.layer.source.shape)
        if not self.begin:
            return dict.fromkeys(whole, 0)
        before = self.layer.format.layout((self.begin, *tail))
        return {
            suffix: tensor_size(CODES[dtype], before[suffix][1])
            for suffix, (dtype, shape) in whole.items()
            if shape or suffix != self.layer.format.matrix_scale
        }

    @property
    def needs_scale(self) -> bool:
        """Whether its scale hangs on weights outside of it."""
        return self.layer.format.matrix_scale is not None and len(self.shape) == 2 and not self.is_whole

    def held(self) -> int:
        """Bytes from reading it until it is written."""
        return self.source_range[1] + _stored_size(self.layer.format, self.shape)

    def work(self, rounding: Rounding) -> int:
        """Bytes more while it is computed."""
        statistics = 2 * self.layer.statistics_size
        widened = 4 * math.prod(self.shape) if self.layer.source.dtype == "F64" else 0
        # What the codes and the nearest ones stand for, and what they are multiplied into; when it is rounded.
        absorbing = ABSORBING * math.prod(self.shape) if statistics else 0
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        widened += WIDE_ROW * max(0, columns - WIDE) * min(rows, torch.get_num_threads())
        own = self.layer.rounding(rounding)
        if self.plain:
            simple = PLAIN_SEARCH if self.layer.format.has_scale_search else PLAIN
            widened += (simple if own.simple else PLAIN_LEARNING) * math.prod(self.shape)
        return widened + statistics + max(absorbing, self._rounding_work(own)) + SMALL

    def _rounding_work(self, own: Rounding) -> int:
        (rows, columns), weights = self.shape[-2:], math.prod(self.shape)
        measured = self.layer.statistics_size > 0
        if own.simple:
            weighs = measured and self.layer.format.has_scale_search and own.scale_search
            return WEIGHING * weights + TRIED if weighs else 0
        learning = LEARNING.get(solver_of(own, measured), RELAXING) * weights
        vectors = EIGENVECTORS * min(rows, columns) ** 2 * math.prod(self.shape[:-2])
        return learning + vectors + (SECOND_MOMENTS * columns**2 + TRIED if measured else 0)

    def need(self, rounding: Rounding) -> int:
        """Bytes of all of it."""
        return self.held() + self.work(rounding)


def _stored_size(fmt: Format, shape: Shape) -> int:
    return sum(tensor_size(CODES[dtype], stored) for dtype, stored in fmt.layout(shape).values())


def whole(layer: Layer, plain: bool = False) -> Tile:
    """The layer in one piece."""
    return Tile(layer, 0, layer.source.shape[0], plain)


def smallest(layer: Layer, rounding: Rounding, plain: bool = False) -> Tile:
    """The least that can be computed by itself."""
    step = _step(layer, rounding)
    return Tile(layer, 0, min(step, layer.source.shape[0]), plain)


def cut(layer: Layer, rounding: Rounding, limit: int, plain: bool = False) -> Iterator[Tile]:
    """Tiles of at most ``limit`` bytes, held and worked on; of the smallest if those are larger."""
    step, rows = _step(layer, rounding), layer.source.shape[0]
    one = smallest(layer, rounding, plain)
    fitting = max(1, (limit - SMALL) // max(1, one.need(rounding) - SMALL)) * step
    for begin in range(0, rows, fitting):
        yield Tile(layer, begin, min(begin + fitting, rows), plain)


def _step(layer: Layer, rounding: Rounding) -> int:
    """Rows of a tile come in multiples of this."""
    if len(layer.source.shape) == 3:
        return 1
    return layer.format.tile_rows if layer.rounding(rounding).simple else layer.source.shape[0]
