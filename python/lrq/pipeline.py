"""How layers flow: read, quantize, write, overlapped; order kept, memory bounded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import lrq_kernels
from lrq.calibration.inputs import InputStats
from lrq.checkpoint.reader import TORCH_DTYPES, Reader
from lrq.checkpoint.writer import Writer
from lrq.config import Conversion
from lrq.dialects import comfyui
from lrq.errors import InputError, printable
from lrq.formats import Tensors
from lrq.plan import Plan
from lrq.repair.bias import OutputError, corrected, mean_shift, output_error
from lrq.rounding.moments import Moments
from lrq.rounding.solve import Outcome, layer_seed, quantize_layer
from lrq.selection.inputs import Inputs
from lrq.selection.layer import Layer
from lrq.staging.conveyor import Conveyor, Load, Step
from lrq.staging.memory import MemoryPlan
from lrq.staging.naming import naming
from lrq.staging.places import place_on
from lrq.staging.tiles import Tile

LARGEST = 2.0**100
"""A larger weight could leave float32: rounded up to the next value of a grid, or summed over a ConvRot group."""
MEASURE, QUANTIZE = "measure", "quantize"
"""What a tile is read for: its largest weight, or its codes."""


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer."""

    name: str
    format: str
    shape: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    """One per matrix of learned rounding; empty for simple rounding, and where an earlier run did it."""
    corrected: bool = False
    """Whether its bias took the mean error."""
    output: OutputError | None = None
    """What the statistics of its inputs say of the outputs; None without them, and where an earlier run did it."""
    statistics: str = ""
    """Which statistics those are."""


OnLayer = Callable[[LayerResult], None]


@dataclass
class _Underway:
    """A layer that is computed or written."""

    result: LayerResult
    writes: list[Future[None]] = field(default_factory=list)


def run_plan(
    source: Reader,
    plan: Plan,
    writer: Writer,
    conversion: Conversion,
    device: torch.device,
    on_layer: OnLayer,
    memory: MemoryPlan,
) -> list[LayerResult]:
    """Write every tensor of the plan; ``on_layer`` hears of each layer when it is written, in the plan's order.

    Raises:
        InputError: a weight that is not finite, a source that changed.
        UnfinishedError: no memory, no disk space, a disk that fails.
    """
    results: list[LayerResult] = []
    underway: deque[_Underway] = deque()

    def land(wait: bool) -> None:
        while underway and (wait or all(write.done() for write in underway[0].writes)):
            for write in underway[0].writes:
                write.result()
            conveyor.check()
            results.append(underway.popleft().result)
            on_layer(results[-1])

    with Conveyor(source, writer, place_on(device, memory.vram_limit), memory) as conveyor:
        quantizer = _Quantizer(source, conversion, device, plan.inputs)
        done = {layer.name for layer in plan.layers if _is_finished(layer, writer)}
        loads = conveyor.loads(_steps(plan, writer, memory, done))
        for layer in plan.layers:
            underway.append(_Underway(LayerResult(layer.name, layer.format.name, layer.source.shape, ())))
            if layer.name not in done:
                _run_layer(quantizer, layer, memory, loads, conveyor, writer, underway[-1])
            land(wait=False)
        for _ in loads:
            raise AssertionError("more was read than planned")
        land(wait=True)
        conveyor.finish()
    return results


def _steps(plan: Plan, writer: Writer, memory: MemoryPlan, done: set[str]) -> Iterator[Step]:
    """In the order of the source, so that a disk reads ahead."""
    layers = {layer.source.begin: layer for layer in plan.layers}
    copied = {entry.begin: entry for entry in plan.copied if entry.size and entry.name not in writer.finished}
    for begin in sorted({*layers, *copied}):
        if begin in copied:
            yield copied[begin]
        if begin in layers and layers[begin].name not in done:
            tiles = memory.tiles[layers[begin].name]
            if tiles[0].needs_scale:
                yield from ((tile, MEASURE) for tile in tiles)
            yield from ((tile, QUANTIZE) for tile in tiles)


def _is_finished(layer: Layer, writer: Writer) -> bool:
    suffixes = [*layer.format.layout(layer.source.shape), comfyui.MARKER]
    suffixes += [comfyui.BIAS] if layer.corrects is not None else []
    suffixes += [comfyui.INPUT_SCALE] if layer.input_scale is not None else []
    return all(f"{layer.name}.{suffix}" in writer.finished for suffix in suffixes)


def _run_layer(
    quantizer: _Quantizer,
    layer: Layer,
    memory: MemoryPlan,
    loads: Iterator[Load],
    conveyor: Conveyor,
    writer: Writer,
    underway: _Underway,
) -> None:
    tiles = memory.tiles[layer.name]
    scale = None
    if tiles[0].needs_scale:
        largest = 0.0
        for _ in tiles:
            load = next(loads)
            largest = max(largest, quantizer.largest(load))
            conveyor.release(load)
        scale = quantizer.scale_of(layer, largest)
    outcomes: list[Outcome] = []
    errors: list[OutputError] = []
    quantizer.begin(layer)
    for _ in tiles:
        more, error = _run_tile(quantizer, next(loads), scale, conveyor, writer, underway.writes)
        outcomes += more
        errors += [] if error is None else [error]
    output = sum(errors[1:], errors[0]) if errors else None
    underway.result = replace(
        underway.result,
        outcomes=tuple(outcomes),
        corrected=layer.corrects is not None,
        output=output,
        statistics=quantizer.statistics,
    )


def _run_tile(
    quantizer: _Quantizer,
    load: Load,
    scale: Tensor | None,
    conveyor: Conveyor,
    writer: Writer,
    writes: list[Future[None]],
) -> tuple[list[Outcome], OutputError | None]:
    """A function of its own: what it computed must not be held while the next tile is waited for."""
    tile, layer = load.tile, load.tile.layer
    tensors, outcomes = quantizer.quantize(load, scale)
    bias, error = quantizer.absorb(load, tensors, scale)
    parts = {f"{layer.name}.{suffix}": (begin, tensors[suffix]) for suffix, begin in tile.places().items()}
    if not tile.begin:
        parts[f"{layer.name}.{comfyui.MARKER}"] = (0, comfyui.marker_tensor(layer.marker))
        if layer.input_scale is not None:
            parts[f"{layer.name}.{comfyui.INPUT_SCALE}"] = (0, torch.tensor(layer.input_scale, dtype=torch.float32))
    if bias is not None:
        parts[f"{layer.name}.{comfyui.BIAS}"] = (tile.begin * bias.element_size(), bias)
    writes += conveyor.write(load, {name: part for name, part in parts.items() if name not in writer.finished})
    return outcomes, error


class _Quantizer:
    """Computes tiles; what can go wrong with a layer is one line that names it."""

    def __init__(self, source: Reader, conversion: Conversion, device: torch.device, inputs: Inputs) -> None:
        self._source, self._conversion, self._device, self._inputs = source, conversion, device, inputs
        self._stats: InputStats | None = None
        self._moments: Moments | None = None

    def begin(self, layer: Layer) -> None:
        """The tiles that follow are of this layer."""
        stats = self._stats = self._inputs.read(layer)
        corrects = layer.corrects is not None
        self._moments = None if stats is None else Moments(layer.format, stats, self._device, corrects)

    @property
    def statistics(self) -> str:
        """Those of the layer, in a few words."""
        return "" if self._stats is None else self._stats.about

    def largest(self, load: Load) -> float:
        """The largest magnitude of a tile."""
        with naming(load.tile):
            return self._checked(load)[1]

    def scale_of(self, layer: Layer, largest: float) -> Tensor:
        """The matrix's scale: that of a matrix with one weight, the largest."""
        one = torch.full((1, 1), largest, dtype=torch.float32, device=self._device)
        name = layer.format.matrix_scale
        assert name is not None
        return layer.format.quantize(one, None)[name]

    def quantize(self, load: Load, scale: Tensor | None) -> tuple[Tensors, list[Outcome]]:
        """Stored tensors of a tile; ``scale`` is that of the matrix, if the tile is not all of it."""
        layer = load.tile.layer
        rounding = layer.rounding(self._conversion.rounding)
        with naming(load.tile):
            w, _ = self._checked(load)
            seed = layer_seed(self._conversion.seed, layer.name)
            return quantize_layer(layer.format, w, rounding, seed, self._moments, scale)

    def absorb(self, load: Load, tensors: Tensors, scale: Tensor | None) -> tuple[Tensor | None, OutputError | None]:
        """The tile's part of the corrected bias, if it moves, and what the statistics say of its outputs."""
        tile, layer, stats = load.tile, load.tile.layer, self._stats
        if stats is None:
            return None, None
        with naming(tile):
            w = _weight(load)
            stored = layer.format.dequantize(tensors, tile.shape)
            error = output_error(w, stored, self._nearest(layer, w, scale), stats)
            if layer.corrects is None:
                return None, error
            shift = mean_shift(w, stored, stats.mean.to(self._device))
            try:
                return corrected(self._bias(tile).to(self._device), shift), error
            except ValueError as problem:
                raise InputError(f"{self._source.path}: layer {printable(layer.name)}: {problem}") from None

    def _nearest(self, layer: Layer, w: Tensor, scale: Tensor | None) -> Tensor:
        """What round-to-nearest would store."""
        w = w.float() if w.dtype == torch.float64 else w
        return layer.format.dequantize(layer.format.quantize(w, None, scale), tuple(w.shape))

    def _bias(self, tile: Tile) -> Tensor:
        """The source's bias of the tile's rows; zeros where it has none."""
        name = f"{tile.layer.name}.{comfyui.BIAS}"
        if name in self._source.entries:
            return self._source.read(name)[tile.begin : tile.end]
        return torch.zeros(tile.end - tile.begin, dtype=TORCH_DTYPES[str(tile.layer.corrects)])

    def _checked(self, load: Load) -> tuple[Tensor, float]:
        entry, w = load.tile.layer.source, _weight(load)
        if w.dtype == torch.float64:
            w = w.float()
        largest = lrq_kernels.amax(w).amax().item()
        # Written so that NaN fails.
        if not largest <= LARGEST:
            what = f"the value {largest:.3g}, beyond every format" if math.isfinite(largest) else "NaN or Inf"
            raise InputError(
                f"{self._source.path}: {printable(entry.name)} holds {what}; repair the source, or leave the layer "
                "away with --exclude_layers"
            )
        return w, largest


def _weight(load: Load) -> Tensor:
    """What the source holds of the tile, in its dtype."""
    size = load.tile.source_range[1]
    return load.memory[:size].view(TORCH_DTYPES[load.tile.layer.source.dtype]).view(load.tile.shape)
