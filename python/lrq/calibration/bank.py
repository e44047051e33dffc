"""The statistics of many experts, whose inputs come together: sums in a few launches instead of a few for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrq.calibration.accumulator import CHUNK, Accumulator, norm, working
from lrq.calibration.inputs import SLOTS, counts_of, magnitude_slots


class Bank:
    """Accumulators of one kind, each of which gets some of the rows of every call."""

    def __init__(self, accumulators: Sequence[Accumulator]) -> None:
        self._accumulators = accumulators
        self._totals: dict[str, Tensor] = {}

    def update(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Add inputs [n,K]: the first accumulator gets so many of the rows, the second so many of the next, ..."""
        if not rows.is_cuda:
            for accumulator, part in zip(self._accumulators, rows.split(list(counts)), strict=True):
                accumulator.update(part)
            return
        if not self._totals:
            self._begin(rows.device)
        rows = rows.to(self._totals["amax"].device)
        with torch.autocast(rows.device.type, enabled=False):
            for first, last, part in self._groups(rows, counts):
                if len(part) * part.shape[1] > CHUNK:
                    self._accumulators[last - 1].update(part)
                else:
                    self._add(slice(first, last), working(part), counts[first:last])

    def _groups(self, rows: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
        """Neighbouring accumulators and their rows, a chunk at most; of more the rows are the last one's alone."""
        first = begin = size = 0
        for number, count in enumerate(counts):
            if size and (size + count) * rows.shape[1] > CHUNK:
                yield first, number, rows[begin : begin + size]
                first, begin, size = number, begin + size, 0
            size += count
        if size:
            yield first, len(counts), rows[begin : begin + size]

    def _begin(self, device: torch.device) -> None:
        """Every accumulator's small sums become a row of ours."""
        count, columns = len(self._accumulators), self._accumulators[0].columns
        shapes = {"first": (columns,), "second": (columns,), "amax": (), "histogram": (SLOTS,)}
        dtypes = {"amax": torch.float32, "histogram": torch.int64}
        self._totals = {
            name: torch.zeros(count, *shape, dtype=dtypes.get(name, torch.float64), device=device)
            for name, shape in shapes.items()
        }
        for number, accumulator in enumerate(self._accumulators):
            accumulator.adopt({name: total[number] for name, total in self._totals.items()})

    def _add(self, which: slice, x: Tensor, counts: Sequence[int]) -> None:
        lengths = torch.tensor(counts, device=x.device)
        totals = {name: total[which] for name, total in self._totals.items()}

        def reduced(y: Tensor, how: str) -> Tensor:
            return torch.segment_reduce(y, how, lengths=lengths, axis=0, unsafe=True, initial=0)

        wide = x.double()
        totals["first"] += reduced(wide, "sum")
        totals["second"] += reduced(wide.square_(), "sum")
        del wide
        torch.maximum(totals["amax"], reduced(norm(x, math.inf, 1), "max"), out=totals["amax"])
        own = torch.arange(len(counts), dtype=torch.int32, device=x.device).repeat_interleave(
            lengths, output_size=len(x)
        )
        places = magnitude_slots(x).int().add_(SLOTS * own[:, None])
        totals["histogram"] += counts_of(places, SLOTS * len(counts)).view(-1, SLOTS)
        for accumulator, part in zip(self._accumulators[which], x.split(list(counts)), strict=True):
            if len(part):
                accumulator.add_products(part)
