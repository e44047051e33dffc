"""Checks a converted file against itself and against its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lrq.calibration.stats import StatsFile
from lrq.checkpoint.header import BITS
from lrq.checkpoint.layout import PROVENANCE
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.config.calibration import Calibration
from lrq.dialects import comfyui
from lrq.errors import InputError, printable
from lrq.formats import Format, Shape, Tensors, read_format
from lrq.models.policy import FLOAT_DTYPES
from lrq.plan import Plan, make_plan, recorded, source_markers
from lrq.report.calibrated import Expected, Predicted, Predictions, check_changes, recorded_changes
from lrq.report.error import GROUP, LayerError, measure
from lrq.report.stored import check_dimensions, check_values, read_tensors, same_bytes, stored_shape
from lrq.report.unquantized import Unquantized, compare, kept_metadata

WORSE_THAN_NEAREST = 1.5
"""A layer with more than this times the error of round-to-nearest was not made from this source, or wrongly."""
WORSE_WHEN_MEASURED = 10.0
"""The same of a layer that was rounded under statistics of its inputs: its error is where they are small. The damping
of GPTQ allows a hundredfold square."""
OUTLIER = 5.0
"""So was one with neighbouring weights of more than this times the error expected of them; learning leaves under 4."""


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer."""

    name: str
    format: str
    shape: Shape
    error: LayerError | None
    """None without a source, or where the source's layer is quantized already."""
    predicted: Predicted | None = None
    """What statistics of its inputs say; None without them."""


@dataclass
class Verification:
    """The result: ``ok`` if no check failed."""

    layers: list[LayerReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unchanged: int = 0
    """Tensors that are byte for byte those of the source."""
    bfloat16: int = 0
    """Tensors that are those of the source, rounded to bfloat16."""

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failures

    @property
    def total(self) -> LayerError | None:
        """The error of all measured layers together."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return sum(errors[1:], errors[0]) if errors else None


def verify_file(
    output: Reader,
    source: Reader | None,
    on_layer: Callable[[LayerReport], None] = lambda layer: None,
    stats: StatsFile | None = None,
) -> Verification:
    """Check names, shapes, dtypes, markers, padding, finiteness, unchanged tensors; measure what error remains.

    With ``stats`` of the inputs, that of the outputs as well.
    """
    result = Verification()
    if source is not None and (other := _other_source(output, source)) is not None:
        # Every other check would fail as well, and bury the reason.
        result.failures.append(other)
        return result
    result.failures += _alignment(output)
    markers, failures = _read_markers(output, source)
    result.failures += failures
    result.failures += _unmarked(output, markers)
    provenance = output.header.metadata.get(PROVENANCE)
    # What statistics did is recorded by tensor: their file need not be there.
    made = recorded(provenance) or Conversion()
    settings = _without_statistics(made)
    own = recorded(provenance, of_this_version=True) is not None
    plan: Plan | None = None
    if source is not None and recorded(provenance) is not None:
        try:
            plan = make_plan(source, settings)
        except InputError as error:
            result.failures += [f"header: the recorded settings do not fit the source: {error}"] if own else []
    if own and source is not None and plan is not None:
        result.failures += _as_planned(source, plan, markers)
    changes = recorded_changes(output)
    rounding = {layer.name: layer.rounding(settings.rounding) for layer in plan.layers} if plan else {}
    predictions = None if stats is None else Predictions(stats, markers.keys(), output, made.calibration)
    for name, marker in markers.items():
        expected = Expected(rounding.get(name, settings.rounding), own, name in changes.measured)
        try:
            layer = _check_layer(output, source, name, marker, expected, predictions)
        except ValueError as error:
            result.failures.append(f"layer {printable(name)}: {error}")
            continue
        result.layers.append(layer)
        on_layer(layer)
    result.failures += check_changes(output, source, changes, markers.keys())
    if source is not None:
        result.failures += kept_metadata(output, source)
        rest = Unquantized({layer.name for layer in result.layers} | markers.keys(), frozenset(changes.tensors))
        if plan is not None:
            rest.dropped, rest.bfloat16 = frozenset(plan.why_dropped), frozenset(plan.bfloat16)
        result.failures += compare(output, source, rest)
        result.unchanged, result.bfloat16 = rest.unchanged, rest.rounded
    if not markers:
        result.failures.append("no layer is quantized: the file has no marker")
    return result


def _without_statistics(settings: Conversion) -> Conversion:
    rounding = settings.rounding
    optimizer = None if rounding.optimizer == "gptq" else rounding.optimizer
    return replace(settings, calibration=Calibration(), rounding=replace(rounding, optimizer=optimizer))


def _alignment(output: Reader) -> Iterator[str]:
    for entry in output.header.entries:
        if (output.header.data_start + entry.begin) % max(BITS[entry.dtype] // 8, 1):
            yield f"tensor {printable(entry.name)}: starts at an offset that is no multiple of its element size"


def _came_quantized(source: Reader | None, name: str) -> bool:
    original = None if source is None else source.entries.get(f"{name}.weight")
    return original is not None and original.dtype not in FLOAT_DTYPES


def _read_markers(output: Reader, source: Reader | None) -> tuple[comfyui.Markers, list[str]]:
    """Markers by layer, and where the two kinds disagree; a layer that came quantized keeps what it came with."""
    failures = []
    try:
        stated = comfyui.read_metadata_entry(output.header.metadata)
    except ValueError as error:
        return {}, [f"header: {error}"]
    markers: comfyui.Markers = {}
    for entry in output.header.entries:
        name, _, suffix = entry.name.rpartition(".")
        if suffix != comfyui.MARKER:
            continue
        try:
            if entry.dtype != "U8" or len(entry.shape) != 1:
                raise ValueError(f"must be U8 in one dimension, is {entry.dtype} {list(entry.shape)}")
            markers[name] = comfyui.read_marker_tensor(b"".join(output.chunks(entry)))
        except ValueError as error:
            failures.append(f"layer {printable(name)}: its {comfyui.MARKER} {error}")
    came = source_markers(source) if source is not None else {}
    for name in sorted(markers.keys() | stated.keys() | came.keys()):
        if _came_quantized(source, name):
            if stated.get(name) != came.get(name):
                failures.append(f"layer {printable(name)}: came quantized, and its entry in {comfyui.METADATA} differs")
        elif markers.get(name) != stated.get(name):
            there = "differs from" if name in markers and name in stated else "is missing from one of"
            failures.append(f"layer {printable(name)}: marker {there} {comfyui.MARKER} and {comfyui.METADATA}")
    return {**stated, **markers}, failures


def _unmarked(output: Reader, markers: comfyui.Markers) -> Iterator[str]:
    for name in output.entries:
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight_scale" and layer not in markers:
            yield f"layer {printable(layer)}: has a scale but no marker; ComfyUI would load it unscaled"


def _check_layer(
    output: Reader,
    source: Reader | None,
    name: str,
    marker: dict[str, Any],
    expected: Expected,
    predictions: Predictions | None,
) -> LayerReport:
    entries = {suffix: output.entries.get(f"{name}.{suffix}") for suffix in comfyui.STORED}
    shapes = {suffix: entry.shape for suffix, entry in entries.items() if entry is not None}
    comfyui.check_marker(marker)
    original = None if source is None else source.entries.get(f"{name}.weight")
    if source is not None and original is None:
        raise ValueError("the source has no such weight")
    if original is not None and _came_quantized(source, name):
        # It came quantized, in whatever format; what counts is that its bytes are the source's.
        return LayerReport(name, str(marker.get("format")), original.shape, None)
    check_dimensions(shapes.get("weight", (1, 1)))
    fmt = read_format(marker, shapes)
    shape = stored_shape(fmt, shapes) if original is None else original.shape
    check_dimensions(shape)
    if fmt.refusal(shape) is not None:
        raise ValueError(f"{fmt.name}: {fmt.refusal(shape)}")
    for key, value in comfyui.layer_marker(fmt, shape).items():
        if marker.get(key, value) != value:
            raise ValueError(f"its marker says {key} {marker[key]}, its tensors {value}")
    tensors = read_tensors(output, name, fmt, shape)
    check_values(fmt, tensors, shape)
    if original is None or source is None:
        return LayerReport(name, fmt.name, shape, None)
    w = source.read(original.name)
    error = measure(fmt, tensors, w, expected.rounding)
    # The scale search gives up plain error for less error along the weight: in a few blocks that may be much.
    allowed = max(error.nearest_plain, error.searched_plain)
    limit = WORSE_WHEN_MEASURED if expected.calibrated(fmt) else WORSE_THAN_NEAREST
    if error.plain > limit**2 * allowed:
        raise ValueError(
            f"{fmt.name}: relative error {error.frobenius:.4g} is {error.frobenius_ratio:.3g} times that of "
            "round-to-nearest; it was not made from this weight, or wrongly"
        )
    if error.outlier > OUTLIER and not expected.calibrated(fmt):
        raise ValueError(
            f"{fmt.name}: {GROUP} neighbouring weights have {error.outlier:.3g} times the error expected of them; "
            "some bytes are not those that were written"
        )
    if expected.own:
        _check_own(fmt, tensors, w, expected)
    predicted = None if predictions is None else predictions.of(name, fmt, tensors, w, source)
    if predictions is not None:
        predictions.check(name, fmt, tensors, w, source, predicted)
    return LayerReport(name, fmt.name, shape, error, predicted)


def _check_own(fmt: Format, tensors: Tensors, w: torch.Tensor, how: Expected) -> None:
    """What this version writes follows from the weight to the bit, but for what learned rounding moves."""
    rounding = how.rounding
    single = w.float() if w.dtype == torch.float64 else w
    expected = fmt.quantize(single, rounding.coherence if rounding.scale_search else None)
    chosen = {"weight": how.codes_chosen(fmt), "weight_scale": how.scales_chosen(fmt)}
    for suffix, tensor in expected.items():
        if not chosen.get(suffix) and not same_bytes(tensors[suffix], tensor):
            raise ValueError(f"{suffix} is not what the recorded settings give for the source's weight")


def _as_planned(source: Reader, plan: Plan, markers: comfyui.Markers) -> Iterator[str]:
    """Which layers are quantized, and their markers, follow from the source and the settings."""
    planned = {layer.name: layer.marker for layer in plan.layers}
    for name in sorted(planned.keys() - markers.keys()):
        yield f"layer {printable(name)}: is not quantized, though the recorded settings quantize it"
    for name, marker in markers.items():
        if name in planned and marker != planned[name]:
            yield f"layer {printable(name)}: its marker is {json.dumps(marker)}, lrq writes {json.dumps(planned[name])}"
        elif name not in planned and f"{name}.weight" in source.entries and not _came_quantized(source, name):
            yield f"layer {printable(name)}: is quantized, though the recorded settings keep it"


def _other_source(output: Reader, source: Reader) -> str | None:
    """What the file says it was made from, if that is not ``source``."""
    try:
        made_from = json.loads(output.header.metadata[PROVENANCE])["source"]
        if made_from["header_sha256"] == source.header_sha256:
            return None
        name, size = printable(str(made_from["name"])), int(made_from["size"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return f"header: made from another source than {source.path}: from {name} of {size} bytes; compare with that one"
