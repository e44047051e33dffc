"""How layers flow: read, quantize, write, overlapped; order kept, memory bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

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
from lrq.selection.layer import Layer
from lrq.staging.conveyor import Conveyor, Load, Step
from lrq.staging.memory import MemoryPlan
from lrq.staging.naming import check_largest, naming
from lrq.staging.places import place_on
from lrq.staging.tiles import Tile
from lrq.staging.workers import Workers

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


@dataclass(frozen=True)
class _Computed:
    """A tile whose tensors are on their way to the disk."""

    outcomes: list[Outcome]
    error: OutputError | None
    writes: list[Future[None]]


@dataclass(frozen=True)
class _Known:
    """Statistics of a layer's inputs, and the metric that they make."""

    stats: InputStats
    moments: Moments


@dataclass
class _Underway:
    """A layer that is computed or written."""

    layer: Layer
    statistics: str = ""
    tiles: list[Future[_Computed]] = field(default_factory=list)

    def is_written(self) -> bool:
        return all(tile.done() and all(write.done() for write in tile.result().writes) for tile in self.tiles)

    def result(self) -> LayerResult:
        """Waits until all of it is written."""
        layer, tiles = self.layer, [tile.result() for tile in self.tiles]
        for write in (write for tile in tiles for write in tile.writes):
            write.result()
        errors = [tile.error for tile in tiles if tile.error is not None]
        output = sum(errors[1:], errors[0]) if errors else None
        outcomes = tuple(outcome for tile in tiles for outcome in tile.outcomes)
        corrected = bool(tiles) and layer.corrects is not None
        about = (layer.name, layer.format.name, layer.source.shape)
        return LayerResult(*about, outcomes, corrected, output, self.statistics)


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
        while underway and (wait or underway[0].is_written()):
            result = underway.popleft().result()
            conveyor.check()
            results.append(result)
            on_layer(result)

    place = place_on(device, memory.vram_limit)
    with Conveyor(source, writer, place, memory) as conveyor, Workers(memory.workers, device) as workers:
        quantizer = _Quantizer(source, conversion, device)
        done = {layer.name for layer in plan.layers if _is_finished(layer, writer)}
        loads = conveyor.loads(_steps(plan, writer, memory, done))
        for layer in plan.layers:
            underway.append(_Underway(layer))
            if layer.name not in done:
                tiles, known = memory.tiles[layer.name], quantizer.known(layer, plan.inputs.read(layer))
                underway[-1].statistics = "" if known is None else known.stats.about
                scale = _scale_of_all(quantizer, tiles, loads, conveyor) if tiles[0].needs_scale else None
                # The matrix's scale was computed on the stream of this thread.
                begin = workers.submit if scale is None else workers.call_here
                for tile in tiles:
                    load = _next(loads, tile, QUANTIZE)
                    call = begin(_run_tile, quantizer, load, scale, known, conveyor, writer)
                    underway[-1].tiles.append(call)
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


def _next(loads: Iterator[Load], tile: Tile, purpose: str) -> Load:
    """The next that was read, which must be this: a layer must never take what belongs to another."""
    load = next(loads)
    if load.tile is not tile or load.purpose != purpose:
        raise AssertionError(f"{load.tile.layer.name} was read where {tile.layer.name} was planned")
    return load


def _scale_of_all(quantizer: _Quantizer, tiles: Sequence[Tile], loads: Iterator[Load], conveyor: Conveyor) -> Tensor:
    """The scale of a matrix that is read once for it, tile by tile."""
    largest = 0.0
    for tile in tiles:
        load = _next(loads, tile, MEASURE)
        largest = max(largest, quantizer.largest(load))
        conveyor.release(load)
    return quantizer.scale_of(tiles[0].layer, largest)


def _run_tile(
    quantizer: _Quantizer,
    load: Load,
    scale: Tensor | None,
    known: _Known | None,
    conveyor: Conveyor,
    writer: Writer,
) -> _Computed:
    """A function of its own: what it computed must not be held while the next tile is waited for."""
    tile, layer = load.tile, load.tile.layer
    tensors, outcomes = quantizer.quantize(load, scale, known)
    bias, error = quantizer.absorb(load, tensors, scale, known)
    parts = {f"{layer.name}.{suffix}": (begin, tensors[suffix]) for suffix, begin in tile.places().items()}
    if not tile.begin:
        parts[f"{layer.name}.{comfyui.MARKER}"] = (0, comfyui.marker_tensor(layer.marker))
        if layer.input_scale is not None:
            parts[f"{layer.name}.{comfyui.INPUT_SCALE}"] = (0, torch.tensor(layer.input_scale, dtype=torch.float32))
    if bias is not None:
        parts[f"{layer.name}.{comfyui.BIAS}"] = (tile.begin * bias.element_size(), bias)
    missing = {name: part for name, part in parts.items() if name not in writer.finished}
    return _Computed(outcomes, error, conveyor.write(load, missing))


class _Quantizer:
    """Computes tiles; what can go wrong with a layer is one line that names it."""

    def __init__(self, source: Reader, conversion: Conversion, device: torch.device) -> None:
        self._source, self._conversion, self._device = source, conversion, device

    def known(self, layer: Layer, stats: InputStats | None) -> _Known | None:
        """What statistics say of a layer."""
        if stats is None:
            return None
        return _Known(stats, Moments(layer.format, stats, self._device, layer.corrects is not None))

    def largest(self, load: Load) -> float:
        """The largest magnitude of a tile."""
        with naming(load.tile):
            return self._checked(load)[1]

    def scale_of(self, layer: Layer, largest: float) -> Tensor:
        """The matrix's scale."""
        return layer.format.scale_of_matrix(torch.tensor(largest, device=self._device))

    def quantize(self, load: Load, scale: Tensor | None, known: _Known | None) -> tuple[Tensors, list[Outcome]]:
        """Stored tensors of a tile; ``scale`` is that of the matrix, if the tile is not all of it."""
        layer = load.tile.layer
        rounding = layer.rounding(self._conversion.rounding)
        with naming(load.tile):
            w, _ = self._checked(load)
            seed = layer_seed(self._conversion.seed, layer.name)
            moments = None if known is None else known.moments
            return quantize_layer(layer.format, w, rounding, seed, moments, scale)

    def absorb(
        self, load: Load, tensors: Tensors, scale: Tensor | None, known: _Known | None
    ) -> tuple[Tensor | None, OutputError | None]:
        """The tile's part of the corrected bias, if it moves, and what the statistics say of its outputs."""
        tile, layer = load.tile, load.tile.layer
        if known is None:
            return None, None
        with naming(tile):
            w = _weight(load)
            stored = layer.format.dequantize(tensors, tile.shape)
            error = output_error(w, stored, self._nearest(layer, w, scale), known.stats)
            if layer.corrects is None:
                return None, error
            shift = mean_shift(w, stored, known.stats.mean.to(self._device))
            before = self._bias(tile).to(self._device)
            try:
                bias = corrected(before, shift)
                return bias, error.with_bias(shift, before.double() - bias.double())
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
        check_largest(self._source.path, entry.name, largest)
        return w, largest


def _weight(load: Load) -> Tensor:
    """What the source holds of the tile, in its dtype."""
    size = load.tile.source_range[1]
    return load.memory[:size].view(TORCH_DTYPES[load.tile.layer.source.dtype]).view(load.tile.shape)
