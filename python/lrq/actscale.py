"""Input scales for a file that is quantized already: no byte of another tensor changes."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrq.calibration.input_scales import input_scale, read_input_scales
from lrq.calibration.naming import match_names
from lrq.calibration.stats import load_stats, sha256_of
from lrq.checkpoint.header import lay_out
from lrq.checkpoint.layout import PROVENANCE, one_file
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.target import check_targets, target_of
from lrq.checkpoint.writer import Writer
from lrq.config.calibration import PERCENTILES
from lrq.dialects import comfyui
from lrq.errors import InputError, listed, printable
from lrq.plan import CALIBRATION, PATCHES, source_markers

_Able = tuple[float, Callable[[int], bool]]
"""What the largest input is scaled to, and whether a layer may have so many inputs."""


@dataclass(frozen=True)
class Patched:
    """What was written."""

    path: Path
    scales: dict[str, float]
    """By layer."""
    notices: list[str] = field(default_factory=list)


def patch_input_scales(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    calib: str | os.PathLike[str] | None = None,
    input_scales: str | os.PathLike[str] | None = None,
    percentile: float = 100.0,
) -> Patched:
    """Copy a quantized file, and give its FP8 and NVFP4 layers an ``input_scale``.

    Args:
        calib: statistics, whose ``percentile`` counts.
        input_scales: JSON or a checkpoint that holds the scales; wins over ``calib``.

    Raises:
        InputError: a file that can't be read, or no layer that gets a scale.
    """
    path = target_of(output)
    low, high = PERCENTILES
    if not low <= percentile <= high:
        raise InputError(f"--actcal_percentile {percentile}: must be from {low:g} to {high:g}")
    with Reader(source) as reader:
        check_targets([path], [*reader.files, calib, input_scales])
        largest = _able(reader)
        if not largest:
            raise InputError(f"{reader.path}: has no FP8 or NVFP4 layer of ComfyUI's, which alone take an input_scale")
        measured, given, notices = _scales(largest, calib, input_scales, percentile)
        scales = measured | given
        if not scales:
            raise InputError(
                f"{calib or input_scales}: has nothing for the layers of {reader.path}; it is of another model"
            )
        missing = sorted(largest.keys() - scales.keys())
        if missing:
            notices.append(f"no input scale for {listed(missing)}")
        made: list[dict[str, Any]] = [{"layers": sorted(given)}]
        if calib is not None:
            left = sorted(measured.keys() - given.keys())
            made.append({"layers": left, "statistics": sha256_of(calib), "percentile": percentile})
        _write(reader, path, scales, made)
    return Patched(path, scales, notices)


def _able(reader: Reader) -> dict[str, _Able]:
    """Layers that take an input_scale."""
    found: dict[str, _Able] = {}
    for layer, marker in source_markers(reader).items():
        weight, limit = reader.entries.get(f"{layer}.weight"), comfyui.LARGEST_INPUT.get(str(marker.get("format")))
        if weight is not None and len(weight.shape) == 2 and limit is not None:
            stored = weight.shape[1]
            packed = marker.get("format") == "nvfp4"
            found[layer] = limit, partial(_fits_packed if packed else operator.eq, stored)
    return found


def _fits_packed(stored: int, columns: int) -> bool:
    # Two to a byte, blocks of 16.
    return 16 * -(-columns // 16) == 2 * stored


def _scales(
    largest: Mapping[str, _Able],
    calib: str | os.PathLike[str] | None,
    input_scales: str | os.PathLike[str] | None,
    percentile: float,
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """By layer, those of the statistics and those that are given, and what is to be said."""
    measured: dict[str, float] = {}
    given: dict[str, float] = {}
    notices = []
    if calib is not None:
        stats = load_stats(calib)
        names, rule = match_names([name for name in stats if name not in stats.transposed], largest.keys())
        for layer, name in names.items():
            limit, fits = largest[layer]
            if not fits(stats.columns(name)):
                raise InputError(
                    f"{calib}: layer {printable(name)} has {stats.columns(name)} inputs, the quantized weight has "
                    "others; they are of another model"
                )
            measured[layer] = input_scale(stats.brief(name), percentile, limit)
        notices += [f"statistics: {rule}"] if rule else []
        notices += [] if stats.measured else ["the statistics are simulated: inputs larger than guessed will clip"]
    if input_scales is not None:
        values = read_input_scales(input_scales)
        names, rule = match_names(values.keys(), largest.keys())
        given = {layer: values[name] for layer, name in names.items()}
        notices += [f"--input_scales: {rule}"] if rule else []
    return measured, given, notices


def _write(reader: Reader, path: Path, scales: Mapping[str, float], made: Sequence[Mapping[str, Any]]) -> None:
    new = {f"{layer}.{comfyui.INPUT_SCALE}": value for layer, value in scales.items()}
    kept = [entry for entry in reader.header.entries if entry.name not in new]
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in kept]
    tensors += [(name, "F32", ()) for name in sorted(new)]
    metadata = {**reader.header.metadata, PROVENANCE: _provenance(reader, scales, made)}
    layout = one_file(path, *lay_out(tensors, metadata))
    values = {"the input scales": json.dumps(sorted(new.items())), "the output's header": layout.digest}
    with Writer(layout, {**reader.fingerprint, **values}) as writer:
        for entry in kept:
            begin = 0
            for piece in reader.chunks(entry) if entry.name not in writer.finished else ():
                writer.write_at(entry.name, begin, piece)
                begin += len(piece)
        for name, value in new.items():
            if name not in writer.finished:
                writer.write(name, torch.tensor(value, dtype=torch.float32))


def _provenance(reader: Reader, scales: Mapping[str, float], made: Sequence[Mapping[str, Any]]) -> str:
    """What the file records of itself, and the layers that have a scale now: by which statistics, or none."""
    made = [one for one in made if one["layers"]]
    try:
        entry: Any = json.loads(reader.header.metadata.get(PROVENANCE, "{}"))
        known = entry.get(CALIBRATION, {})
        before = known.get("input_scales", [])
        patches = [{**one, "layers": sorted(set(one["layers"]) - scales.keys())} for one in known.get(PATCHES, [])]
        made = [*(one for one in patches if one["layers"]), *made]
        own = {"input_scales": sorted({*before, *scales}), PATCHES: made}
        return json.dumps({**entry, CALIBRATION: {**known, **own}})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return json.dumps({CALIBRATION: {"input_scales": sorted(scales), PATCHES: made}})
