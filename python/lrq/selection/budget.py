"""``--target_bits``: the format of every layer that makes the summed error least within a size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lrq.formats import FORMATS, Format, Shape, bfloat16

SOURCE = "source"
"""The name of the choice that leaves a layer as it is."""
CANDIDATES = tuple(FORMATS[name] for name in ("nvfp4", "fp8", "mxfp8"))
"""Formats to choose among, from small to large; the source's own comes on top, below it bfloat16 if that is smaller."""


@dataclass(frozen=True)
class Point:
    """A layer in one format."""

    name: str
    bits: int
    """Of codes and of scales by block or row."""
    error: float
    """What it adds to the sum."""


@dataclass(frozen=True)
class Allocation:
    """What a budget buys."""

    chosen: dict[str, Point]
    """By layer."""
    corners: list[tuple[int, float]]
    """Bits and summed error of every budget that the hulls spend to the last bit, from the least on."""


def stored_bits(fmt: Format, shape: Shape) -> int:
    """Bits of a weight's codes and scales; markers and one scale a matrix, some bytes a layer, do not count."""
    matrices = math.prod(shape[:-2])
    sizes = ((math.prod(own), dtype.itemsize) for dtype, own in fmt.layout(shape).values())
    return sum(8 * count * size for count, size in sizes if count > matrices)


def weight_of_error(shape: Shape) -> int:
    """How much the squared relative error of a layer counts: once for every output that it reaches.

    Of layers with the same error the one with the fewest inputs an output then gains most from a byte. Chosen by what
    two real models say (README): weights by parameters or by the size of the weights did worse there on the whole.
    """
    return math.prod(shape[:-1])


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points of the convex lower hull, from the smallest size on, as far as the error falls."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.error)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(smaller: Point, larger: Point) -> float:
    return (smaller.error - larger.error) / (larger.bits - smaller.bits)


def least_bits(layers: Mapping[str, Sequence[Point]]) -> int:
    """Bits of the smallest choice."""
    return sum(min(point.bits for point in points) for points in layers.values())


def allocate(layers: Mapping[str, Sequence[Point]], budget: int) -> Allocation:
    """The points, one a layer, whose errors' sum is least within a budget.

    Along the hulls the steps are taken in the order of what a bit gains: exact wherever the budget ends with a step
    (Shoham and Gersho 1988). What is left over goes to later steps that still fit; one format for all layers is taken
    instead where that is better.

    Args:
        budget: bits for all layers together, at least :func:`least_bits`.
    """
    hulls = {name: lower_hull(points) for name, points in layers.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    used, error = sum(point.bits for point in chosen.values()), sum(point.error for point in chosen.values())
    corners = [(used, error)]
    full: set[str] = set()
    at, left = error, budget - used
    for name, smaller, larger in _steps(hulls):
        used, error = used + larger.bits - smaller.bits, error + larger.error - smaller.error
        corners.append((used, error))
        if name not in full and larger.bits - smaller.bits <= left:
            chosen[name], left, at = larger, left - larger.bits + smaller.bits, at + larger.error - smaller.error
        else:
            full.add(name)
    for uniform in _uniform(layers):
        fits = sum(point.bits for point in uniform.values()) <= budget
        if fits and sum(point.error for point in uniform.values()) < at:
            chosen, at = uniform, sum(point.error for point in uniform.values())
    return Allocation(chosen, corners)


def _steps(hulls: Mapping[str, Sequence[Point]]) -> list[tuple[str, Point, Point]]:
    """Layer and two neighbours on its hull, those first whose bits gain most."""
    steps = [(name, *pair) for name, hull in hulls.items() for pair in pairwise(hull)]
    return sorted(steps, key=lambda step: -_gain(step[1], step[2]))


def _uniform(layers: Mapping[str, Sequence[Point]]) -> Iterator[dict[str, Point]]:
    named = {name: {point.name: point for point in points} for name, points in layers.items()}
    for kind in (*(fmt.name for fmt in CANDIDATES), bfloat16.NAME, SOURCE):
        if all(kind in points for points in named.values()):
            yield {name: points[kind] for name, points in named.items()}
