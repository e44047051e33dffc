"""How layers flow: read, quantize, write, one layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lrq.checkpoint.reader import Reader
from lrq.checkpoint.writer import Writer
from lrq.config import Conversion
from lrq.dialects import comfyui
from lrq.errors import InputError, UnfinishedError, printable
from lrq.plan import Layer, Plan
from lrq.rounding.solve import Outcome, layer_seed, quantize_layer
from lrq_kernels.dispatch import BackendError

LARGEST = 2.0**100
"""A larger weight could leave float32: rounded up to the next value of a grid, or summed over a ConvRot group."""


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer."""

    name: str
    format: str
    shape: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    """One per matrix of learned rounding; empty for simple rounding."""


OnLayer = Callable[[LayerResult], None]


def run_plan(
    source: Reader, plan: Plan, writer: Writer, conversion: Conversion, device: torch.device, on_layer: OnLayer
) -> list[LayerResult]:
    """Write every tensor of the plan; ``on_layer`` hears of each layer when it is written.

    Raises:
        InputError: a weight that is not finite, a source that changed, no memory, no disk space.
    """
    for entry in plan.copied:
        if entry.name not in writer.finished:
            begin = 0
            for chunk in source.chunks(entry):
                writer.write_at(entry.name, begin, chunk)
                begin += len(chunk)
    results = []
    for layer in plan.layers:
        if all(f"{layer.name}.{suffix}" in writer.finished for suffix in _suffixes(layer)):
            results.append(LayerResult(layer.name, layer.format.name, layer.source.shape, ()))
        else:
            results.append(_run_layer(source, layer, writer, conversion, device))
        on_layer(results[-1])
    return results


def _suffixes(layer: Layer) -> list[str]:
    return [*layer.format.layout(layer.source.shape), comfyui.MARKER]


def _run_layer(
    source: Reader, layer: Layer, writer: Writer, conversion: Conversion, device: torch.device
) -> LayerResult:
    try:
        w = source.read(layer.source.name).to(device)
        if w.dtype == torch.float64:
            w = w.float()
        _check_values(source, layer, w)
        seed = layer_seed(conversion.seed, layer.name)
        tensors, outcomes = quantize_layer(layer.format, w, conversion.rounding, seed)
    except torch.OutOfMemoryError:
        raise UnfinishedError(
            f"layer {printable(layer.name)} {list(layer.source.shape)}: out of memory on {device}; "
            "use --device cpu, or --simple, which needs less"
        ) from None
    except BackendError as error:
        raise InputError(str(error)) from None
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"layer {printable(layer.name)}: its singular directions can't be computed ({reason}); use --simple"
        ) from None
    for suffix, tensor in {**tensors, comfyui.MARKER: comfyui.marker_tensor(layer.marker)}.items():
        if f"{layer.name}.{suffix}" not in writer.finished:
            writer.write(f"{layer.name}.{suffix}", tensor)
    return LayerResult(layer.name, layer.format.name, layer.source.shape, tuple(outcomes))


def _check_values(source: Reader, layer: Layer, w: torch.Tensor) -> None:
    largest = w.abs().amax().item()
    # Written so that NaN fails.
    if not largest <= LARGEST:
        what = f"the value {largest:.3g}, beyond every format" if math.isfinite(largest) else "NaN or Inf"
        raise InputError(
            f"{source.path}: {printable(layer.source.name)} holds {what}; repair the source, or leave the layer "
            "away with --exclude_layers"
        )
