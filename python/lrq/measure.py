"""What only the weights can tell: the measured parts of --heur, --max_error and --target_bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.errors import InputError, counted, printable
from lrq.formats import FORMATS, Format, bfloat16
from lrq.models.policy import SUFFIX
from lrq.plan import make_plan
from lrq.repair.bias import output_error
from lrq.selection.budget import CANDIDATES, SOURCE, Point, allocate, least_bits, stored_bits, weight_of_error
from lrq.selection.evenness import evenness
from lrq.selection.heuristics import PART, nearest, out_of_line, relative_error, widen
from lrq.selection.inputs import Inputs
from lrq.selection.layer import Layer
from lrq.selection.storage import spec_of
from lrq.staging.memory import SLACK, SPREAD, megabytes
from lrq.staging.naming import check_largest
from lrq.staging.process import resident, return_large_blocks

STEP = 0.25
"""Bits a weight between two points of the curve that is reported."""


@dataclass(frozen=True)
class Budget:
    """What --target_bits bought."""

    target: float
    bits: float
    """Of a weight, of those it decides on, without markers."""
    error: float
    """Percent, as a root mean square over all outputs: projected, or that of statistics of the inputs."""
    curve: list[tuple[float, float]]
    """Bits and error of other targets, from the least on, as far as something is quantized."""


def measures(conversion: Conversion) -> bool:
    """Whether the weights decide on formats, too."""
    selection = conversion.selection
    return selection.heur or selection.max_error is not None or selection.target_bits is not None


def check_memory(layers: Sequence[Layer], limit: int | None, more: Callable[[Layer], int] = lambda layer: 0) -> None:
    """Raise :class:`InputError` where a layer that is measured, which is read whole, leaves the bound of the memory.

    Args:
        more: bytes that measuring the layer takes beyond the parts that are rounded.
    """
    return_large_blocks()
    if limit is None or not layers:
        return

    def need(layer: Layer) -> int:
        weights = math.prod(layer.source.shape)
        return layer.source.size + 32 * min(weights, PART) + more(layer)

    layer = max(layers, key=need)
    most = resident() + SLACK + need(layer)
    if most > limit:
        raise InputError(
            f"layer {printable(layer.name)} {list(layer.source.shape)}: is measured whole, which --max_ram does not "
            f"allow; raise it to {megabytes(most + SPREAD)}, or leave --heur, --max_error and "
            "--target_bits away"
        )


def _of_evenness(layer: Layer) -> int:
    return 4 * min(layer.source.shape[-2:]) ** 2


def _of_outputs(layer: Layer) -> int:
    return 8 * math.prod(layer.source.shape) + 2 * layer.statistics_size


def measure_layers(
    source: Reader, conversion: Conversion, device: torch.device, limit: int | None = None
) -> tuple[Conversion, Budget | None]:
    """The conversion with a decision for every layer that a measurement changes.

    Args:
        limit: bytes of host memory.

    Raises:
        InputError: as :func:`~lrq.plan.make_plan`; a target below what the smallest formats take; a layer beyond the
            limit.
    """
    selection, budget = conversion.selection, None
    if selection.target_bits is not None:
        conversion = _with_family(conversion, nvfp4=True)
    plan = make_plan(source, conversion, allow_empty=selection.target_bits is not None)
    formats = {layer.name: layer.format for layer in plan.layers if not layer.asked}
    if selection.heur or selection.max_error is not None:
        check_memory([layer for layer in plan.layers if layer.name in formats], limit)

    def read(name: str) -> Tensor:
        w = source.read(f"{name}{SUFFIX}").to(device)
        low, high = w.aminmax()
        check_largest(source.path, f"{name}{SUFFIX}", max(-low.item(), high.item()))
        return w

    changed: dict[str, dict[str, Any]] = {}
    if selection.heur:
        reasons = out_of_line(formats.items(), read)
        changed = {name: {"skip": True, "_why": why} for name, why in reasons.items()}
    if selection.max_error is not None:
        for layer in (layer for layer in plan.layers if layer.name in formats and layer.name not in changed):
            wider = widen(layer, read(layer.name), selection.max_error)
            if wider is not None:
                changed[layer.name] = wider
    if selection.target_bits is not None:
        layers = [layer for layer in plan.layers if layer.name not in changed]
        wide = make_plan(source, _with_family(conversion, nvfp4=False), allow_empty=True)
        free = _free_layers(layers, [layer for layer in wide.layers if layer.name not in changed])
        fixed = [layer for layer in layers if layer.name not in free]
        # What was decided before, in a plan or a file that is made again, stays so.
        if fixed and not free and not selection.layers:
            raise InputError(
                f"--target_bits {selection.target_bits:g}: rules decide on {counted(len(fixed), 'layer')}, which are "
                "all; leave the target away, or some of the rules"
            )
        if free:
            more = _of_evenness if wide.inputs.stats is None else _of_outputs
            check_memory([layer for layer, _ in free.values()], limit, more)
            bought, budget = _spend(conversion, free, fixed, read, wide.inputs)
            changed |= bought
    decided = {**(selection.layers or {}), **changed}
    return replace(conversion, selection=replace(selection, layers=decided or None)), budget


def _with_family(conversion: Conversion, nvfp4: bool) -> Conversion:
    return replace(conversion, storage=replace(conversion.storage, nvfp4=nvfp4))


def _free_layers(narrow: list[Layer], wide: list[Layer]) -> dict[str, tuple[Layer, tuple[Format, ...]]]:
    """Layers that no rule gives a format, and the formats they may take: NVFP4 where a run with NVFP4 stores them."""
    ruled = {layer.name for layer in narrow if layer.asked or layer.why}
    small = {layer.name for layer in narrow}
    free = [layer for layer in wide if not (layer.asked or layer.why or layer.name in ruled)]
    return {layer.name: (layer, CANDIDATES if layer.name in small else CANDIDATES[1:]) for layer in free}


def _error(fmt: Format | None, w: Tensor, stats: InputStats | None) -> float:
    """|Ŵ − W|/|W| of round-to-nearest, or of its outputs where statistics of the inputs are known; None: bfloat16."""
    if stats is None:
        return relative_error(fmt, w)
    single = w.float()
    stored = nearest(fmt, single)
    return output_error(single, stored, stored, stats).before


def _spend(
    conversion: Conversion,
    free: dict[str, tuple[Layer, tuple[Format, ...]]],
    fixed: list[Layer],
    read: Callable[[str], Tensor],
    inputs: Inputs,
) -> tuple[dict[str, dict[str, Any]], Budget]:
    """The rules that spend the budget; layers whose format is fixed take their part of it."""
    target = conversion.selection.target_bits or 0.0
    # By a function: one layer is in memory at a time.
    points = {name: _points(*choice, read(name), inputs.read(choice[0])) for name, choice in free.items()}
    taken = sum(stored_bits(layer.format, layer.source.shape) for layer in fixed)
    shapes = [layer.source.shape for layer in (*fixed, *(layer for layer, _ in free.values()))]
    weights = sum(map(math.prod, shapes))
    outputs = sum(weight_of_error(layer.source.shape) for layer, _ in free.values())
    least = (least_bits(points) + taken) / weights
    if target < least:
        with_rules = ", with those that rules choose," if fixed else ""
        raise InputError(
            f"--target_bits {target:g}: the smallest formats that the layers take{with_rules} need {least:.4f} bits"
        )
    bought = allocate(points, math.floor(target * weights) - taken)
    spent = sum(point.bits for point in bought.chosen.values())
    left = sum(point.error for point in bought.chosen.values())
    # From there on nothing would be quantized.
    end = math.inf if fixed else sum(min(p.bits for p in some if p.name not in FORMATS) for some in points.values())
    corners = [corner for corner in bought.corners if corner[0] < end]
    curve = [(round((bits + taken) / weights, 4), _percent(error, outputs)) for bits, error in corners]
    why = {"_why": f"--target_bits {target:g}"}
    rules = {name: _rule(free[name][0], point) | why for name, point in bought.chosen.items()}
    return rules, Budget(target, round((spent + taken) / weights, 4), _percent(left, outputs), _thinned(curve))


def _points(layer: Layer, formats: Sequence[Format], w: Tensor, stats: InputStats | None) -> list[Point]:
    """What a layer takes and loses in each format, and as it is."""
    shape = layer.source.shape
    counts = weight_of_error(shape) * (evenness(w) if stats is None else 1.0)
    sizes = {fmt: stored_bits(fmt, shape) for fmt in formats if fmt.refusal(shape) is None}
    points = [Point(fmt.name, bits, counts * _error(fmt, w, stats) ** 2) for fmt, bits in sizes.items()]
    if layer.source.dtype in bfloat16.WIDER:
        points.append(Point(bfloat16.NAME, 16 * math.prod(shape), counts * _error(None, w, stats) ** 2))
    return [*points, Point(SOURCE, 8 * layer.source.size, 0.0)]


def _rule(layer: Layer, chosen: Point) -> dict[str, Any]:
    if chosen.name == SOURCE:
        return {"skip": True}
    if chosen.name == bfloat16.NAME:
        return {"format": bfloat16.NAME}
    return spec_of(FORMATS[chosen.name], layer.full_precision, layer.simple)


def _percent(error: float, outputs: int) -> float:
    return round(100 * math.sqrt(max(error, 0.0) / outputs), 4)


def _thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Its points that are a step of bits apart at least, and the last."""
    kept = curve[:1]
    for point in curve[1:]:
        if point[0] - kept[-1][0] >= STEP:
            kept.append(point)
    return kept if kept[-1] == curve[-1] else [*kept, curve[-1]]
