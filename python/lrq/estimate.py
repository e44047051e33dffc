"""What a conversion will need: memory from the plan, time from a small calibration of this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cache

import torch

from lrq.calibration.inputs import BINS
from lrq.calibration.simulate import standard_normal
from lrq.config import Conversion, Rounding
from lrq.execution import Execution
from lrq.formats import FORMATS, Format, Shape
from lrq.formats.int8 import Int8
from lrq.plan import Plan
from lrq.rounding.metric import subspace_size
from lrq.rounding.moments import Moments
from lrq.rounding.solve import quantize_layer
from lrq.selection.layer import Layer
from lrq.staging.memory import plan_memory

DISK = 5e8
"""Bytes a second that are read and written; a guess: measuring it would touch the disk."""
LARGE = 0.32
"""Time for one weight and direction of a large layer, in units of that of the calibration's small one."""
DIAGONAL, CORRELATED = "diagonal", "correlated"
"""What statistics hold of E[xx']; both lead to another solver."""
UNEQUAL = 10
"""How often more iterations a layer takes whose inputs are known to be unequal (352 against 32 on MiniLM)."""
_SIDE, _LEARNED_SIDE = 512, 192
"""Sides of the matrices of the calibration."""


@dataclass(frozen=True)
class Estimate:
    """Predicted need of a run."""

    host_bytes: int
    """Peak memory of the process."""
    gpu_bytes: int
    """Peak memory of the GPU; 0 on the CPU."""
    seconds: float


def estimate(plan: Plan, conversion: Conversion, execution: Execution, device: torch.device) -> Estimate:
    """Predict memory and time of a conversion on a device.

    Raises:
        InputError: a layer can't fit into the memory that the execution allows.
    """
    kinds: dict[tuple[Format, Shape, bool | None, int], list[Layer]] = {}
    for layer in plan.layers:
        kinds.setdefault((layer.format, layer.source.shape, layer.simple, layer.statistics_size), []).append(layer)
    some = [alike[0] for alike in kinds.values()]
    memory = plan_memory(some, conversion.rounding, device, execution, len(plan.layers))
    seconds = sum(len(alike) * _layer_seconds(alike[0], conversion.rounding, device) for alike in kinds.values())
    moved = plan.output_size + sum(layer.source.size for layer in plan.layers) + sum(e.size for e in plan.copied)
    return Estimate(memory.host, memory.vram, seconds + moved / DISK)


def _layer_seconds(layer: Layer, rounding: Rounding, device: torch.device) -> float:
    own = layer.rounding(rounding)
    weights = math.prod(layer.source.shape)
    seconds = weights * _nearest_rate(layer.format, own.scale_search, str(device))
    if own.simple:
        return seconds
    rows, columns = layer.source.shape[-2:]
    known = _known(layer)
    return seconds + weights * _products(rows, columns, own, layer.format, known) * LARGE * _learned_rate(
        layer.format, known, str(device)
    )


def _known(layer: Layer) -> str:
    """What is known of a layer's inputs: nothing, mean and diagonal, or more of E[xx']."""
    if not layer.statistics_size:
        return ""
    return CORRELATED if layer.statistics_size > 8 * (2 * layer.source.shape[-1] + BINS + 2) else DIAGONAL


def _products(rows: int, columns: int, rounding: Rounding, fmt: Format, known: str) -> float:
    """Products a weight: with the directions or the columns behind it, a block of 128 columns, and a decomposition."""
    if known == CORRELATED:
        return columns + 128 + columns**2 / rows / 8
    directions = subspace_size((rows, columns), rounding, fmt.top_p)
    return directions + 128 + min(rows, columns) / 8


@cache
def _nearest_rate(fmt: Format, scale_search: bool, device: str) -> float:
    """Seconds for one weight, rounded to nearest."""
    w = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    rounding = Rounding(simple=True, scale_search=scale_search)
    return min(_timed(fmt, w, rounding) for _ in range(2)) / w.numel()


@cache
def _learned_rate(fmt: Format, known: str, device: str) -> float:
    """Seconds for one product of one weight, learned."""
    w = torch.randn(_LEARNED_SIDE, _LEARNED_SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    rounding, moments = Rounding(), None
    if known == CORRELATED:
        stats = replace(standard_normal(_LEARNED_SIDE), gram=torch.eye(_LEARNED_SIDE))
        moments = Moments(fmt, stats, w.device)
    products = w.numel() * _products(_LEARNED_SIDE, _LEARNED_SIDE, rounding, fmt, known)
    return _timed(fmt, w, rounding, moments) / products * (UNEQUAL if known == DIAGONAL else 1)


def _timed(fmt: Format, w: torch.Tensor, rounding: Rounding, moments: Moments | None = None) -> float:
    if fmt.refusal(tuple(w.shape)) is not None:
        # Blocks and groups that the small matrix has no room for cost as little as rows.
        fmt, moments = FORMATS["int8-row" if isinstance(fmt, Int8) else "fp8-row"], None
    started = time.perf_counter()
    quantize_layer(fmt, w, rounding, 0, moments)
    if w.device.type == "cuda":
        torch.cuda.synchronize(w.device)
    return time.perf_counter() - started
