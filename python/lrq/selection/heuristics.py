"""Layers that quantization serves badly: ``--heur``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor

from lrq.dialects import comfyui
from lrq.formats import FORMATS, Format, Shape
from lrq.selection.layer import Layer
from lrq.selection.storage import spec_of

TOO_SMALL = 1 << 16
"""Weights of a layer that saves under 0.1 MB, and whose product is over before its kernel has started."""
THIN = 64
"""Ratio of the sides beyond which a product waits for memory, not for arithmetic."""
WIDER: tuple[tuple[str, Format], ...] = (("nvfp4", FORMATS["mxfp8"]),)
"""The next wider format, where there is one before the source's own."""
PART = 1 << 20
"""Weights that are rounded at a time."""
OUT_OF_LINE = 2.0
"""Errors more than this times the median of the model's layers in the same format are out of line."""
FEWEST = 5
"""Layers of one format that a median is taken of."""


def unsuitable(fmt: Format, shape: Shape) -> str | None:
    """Why a weight of this shape gains nothing from the format, or None."""
    rows, columns = shape[-2:]
    weights = math.prod(shape)
    if weights < TOO_SMALL:
        return f"too small to gain: {weights} weights, under {TOO_SMALL}"
    if max(rows, columns) > THIN * min(rows, columns):
        return f"extreme aspect ratio: {rows} x {columns}, over {THIN} : 1"
    reason = comfyui.full_precision_reason(fmt, shape)
    return None if reason is None else f"no fast matmul: {reason}"


def relative_error(fmt: Format | None, w: Tensor) -> float:
    """|Ŵ − W| / |W| of round-to-nearest, in bfloat16 where no format is given; 0 for a weight of zeros."""
    weight = error = 0.0
    step = 1 if fmt is None else fmt.tile_rows
    for matrix in w if w.dim() == 3 else (w,):
        rows = max(1, PART // matrix.shape[1] // step) * step
        in_parts = fmt is not None and rows < matrix.shape[0] and fmt.matrix_scale is not None
        scale = fmt.scale_of_matrix(_largest(matrix)) if fmt is not None and in_parts else None
        for part in matrix.split(rows):
            single = part.float()
            stored = nearest(fmt, single, scale)
            # The squares of large weights leave float32.
            weight += torch.linalg.vector_norm(single, dtype=torch.float64).item() ** 2
            error += torch.linalg.vector_norm(stored - single, dtype=torch.float64).item() ** 2
    return math.sqrt(error / weight) if weight > 0 else 0.0


def nearest(fmt: Format | None, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """What round-to-nearest stores of a float32 weight, float32; in bfloat16 where no format is given."""
    if fmt is None:
        return w.bfloat16().float()
    return fmt.dequantize(fmt.quantize(w, None, scale), tuple(w.shape))


def _largest(matrix: Tensor) -> Tensor:
    # Without a copy of it, as its magnitudes would be.
    low, high = matrix.aminmax()
    return torch.maximum(high, -low)


def widen(layer: Layer, w: Tensor, limit: float) -> dict[str, object] | None:
    """The rule that stores a weight in the first wider format whose error is within the limit; None: this one's is."""
    ladder = [layer.format, *(wider for name, wider in WIDER if layer.format.name == name)]
    reasons: list[str] = []
    for candidate in ladder:
        error = relative_error(candidate, w)
        if error <= limit:
            why = f"--max_error {limit:g}: {'; '.join(reasons)}"
            spec = spec_of(candidate, layer.full_precision, layer.simple)
            return {**spec, "_why": why} if reasons else None
        reasons.append(f"{error:.4f} in {candidate.name}")
    return {"skip": True, "_why": f"--max_error {limit:g}: {'; '.join(reasons)}"}


def out_of_line(
    layers: Iterable[tuple[str, Format]],
    read: Callable[[str], Tensor],
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, str]:
    """Reason by layer, for those whose error is out of line with the model's other layers in the same format."""
    errors: dict[str, dict[str, float]] = {}
    for name, fmt in layers:
        errors.setdefault(fmt.name, {})[name] = relative_error(fmt, read(name))
        on_layer(name)
    reasons = {}
    for fmt_name, found in errors.items():
        usual = median(found.values())
        for name, error in found.items():
            if len(found) >= FEWEST and error > OUT_OF_LINE * usual:
                reasons[name] = f"error out of line: {error:.4f} in {fmt_name}, the median is {usual:.4f}"
    return reasons
