"""Which layers get what from statistics of their inputs: a corrected bias, an input scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrq.calibration.input_scales import input_scale, read_input_scales
from lrq.calibration.inputs import InputStats
from lrq.calibration.naming import match_names
from lrq.calibration.stats import StatsFile, load_stats, sha256_of
from lrq.checkpoint.header import Entry
from lrq.checkpoint.reader import Reader
from lrq.config.calibration import Calibration
from lrq.dialects import comfyui
from lrq.errors import InputError, counted, listed, printable
from lrq.selection.layer import Layer
from lrq.selection.simulated import SimulatedInputs

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of biases that can be corrected."""
FILES = ("statistics", "given_scales")
"""Entries of the provenance that name files, by hash."""


@dataclass
class Inputs:
    """What is known of the inputs of a plan's layers."""

    stats: StatsFile | SimulatedInputs | None = None
    names: dict[str, str] = field(default_factory=dict)
    """By layer, what the file of statistics calls it."""
    notices: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the output records: the files, by hash, and the layers whose bias moved or that have an input scale."""

    def read(self, layer: Layer) -> InputStats | None:
        """The statistics of a layer, or None where there are none."""
        name = self.names.get(layer.name)
        return None if name is None or self.stats is None else self.stats[name]


def use_inputs(layers: Sequence[Layer], source: Reader, settings: Calibration) -> Inputs:
    """Read the settings' files, and say of every layer of the source what it gets.

    Raises:
        InputError: a file that can't be read, or that is of another model.
    """
    inputs = Inputs()
    if settings.calib is not None:
        _match(inputs, layers, load_stats(settings.calib), str(source.path))
        if settings.bias_correction:
            _correct_biases(inputs, layers, source.entries, settings.add_bias)
    elif settings.simulate is not None:
        simulated = SimulatedInputs(source, settings.simulate, settings.calib_samples, settings.actcal_lora)
        _match(inputs, layers, simulated, str(source.path))
    scales: dict[str, float] = {}
    if settings.actcal:
        scales |= _calibrated(inputs, layers, settings.actcal_percentile)
    if settings.input_scales is not None:
        scales |= _given(inputs, layers, settings.input_scales)
    for layer in layers:
        layer.input_scale = scales.get(layer.name)
    if scales:
        inputs.provenance["input_scales"] = sorted(scales)
    elif settings.actcal:
        inputs.notices.append("--actcal: no layer has both statistics and a format with input_scale")
    return inputs


def _match(inputs: Inputs, layers: Sequence[Layer], stats: StatsFile | SimulatedInputs, where: str) -> None:
    shapes = {layer.name: layer.source.shape for layer in layers}
    usable = [name for name in stats if name not in stats.transposed]
    inputs.stats = stats
    inputs.names, rule = match_names(usable, shapes.keys())
    if layers and not stats and isinstance(stats, SimulatedInputs):
        raise InputError(f"--simulate: no layer of {where} stands behind a norm with gains; gaussian asks for no norm")
    if layers and not usable and stats.transposed:
        raise InputError(
            f"{stats.path}: all layers are stored as [K,N] (Conv1D), which statistics are not used for yet; convert "
            "without them"
        )
    if layers and not inputs.names:
        raise InputError(
            f"{stats.path}: has {printable(next(iter(stats), 'nothing'))}, ..., but no layer that is quantized in "
            f"{where}, as {printable(layers[0].name)}; they are of another model"
        )
    for layer, name in inputs.names.items():
        if stats.columns(name) != shapes[layer][-1]:
            raise InputError(
                f"{stats.path}: layer {printable(name)} has {stats.columns(name)} inputs, in {where} it has "
                f"{shapes[layer][-1]}; they are of another model"
            )
    for one in layers:
        one.statistics_size = stats.size(inputs.names[one.name]) if one.name in inputs.names else 0
    about = {"name": stats.path.name, "sha256": stats.digest(), "origin": stats.origin, "layers": len(inputs.names)}
    inputs.provenance["statistics"] = about
    inputs.provenance["measured_layers"] = sorted(inputs.names)
    missing = [layer.name for layer in layers if layer.name not in inputs.names]
    inputs.notices += [f"statistics: {rule}"] if rule else []
    inputs.notices += _said("statistics: none of", missing)
    inputs.notices += _said("statistics: not used, the weight is stored transposed:", stats.transposed)


def _correct_biases(inputs: Inputs, layers: Sequence[Layer], entries: Mapping[str, Entry], add: bool) -> None:
    """A bias moves where the mean was measured, and there is one, or one is added."""
    assert inputs.stats is not None
    if not inputs.stats.measured:
        inputs.notices.append("no bias is corrected: the statistics are simulated, and a mean must be measured")
        return
    corrected, added, without = [], [], []
    for layer in layers:
        if layer.name not in inputs.names:
            continue
        bias, shape = entries.get(f"{layer.name}.bias"), layer.source.shape
        if len(shape) != 2 or (bias is None and not add):
            without.append(layer.name)
        elif bias is None:
            layer.corrects = layer.source.dtype
            added.append(layer.name)
        elif bias.shape == shape[:1] and bias.dtype in FLOATS:
            layer.corrects = bias.dtype
            corrected.append(layer.name)
        else:
            without.append(layer.name)
    inputs.provenance |= {"corrected_biases": corrected, "added_biases": added}
    done = len(corrected) + len(added)
    also = f", {len(added)} of them added" if added else ""
    inputs.notices.append(f"bias correction: {counted(done, 'bias').replace('biass', 'biases')}{also}")
    inputs.notices += _said("no bias to correct in", without)


def _calibrated(inputs: Inputs, layers: Sequence[Layer], percent: float) -> dict[str, float]:
    assert inputs.stats is not None
    scales = {}
    for layer in layers:
        largest = comfyui.largest_input(layer.format, layer.source.shape)
        if largest is not None and layer.name in inputs.names:
            scales[layer.name] = input_scale(inputs.stats.brief(inputs.names[layer.name]), percent, largest)
    return scales


def _given(inputs: Inputs, layers: Sequence[Layer], file: str) -> dict[str, float]:
    values = read_input_scales(file)
    able = {one.name for one in layers if comfyui.largest_input(one.format, one.source.shape) is not None}
    names, rule = match_names(values.keys(), able)
    if not names:
        raise InputError(f"{file}: has input scales of no layer that takes one, in FP8 or NVFP4")
    inputs.notices += [f"--input_scales: {rule}"] if rule else []
    inputs.notices += _said("--input_scales: not used, no FP8 or NVFP4 layer:", values.keys() - names.values())
    inputs.provenance["given_scales"] = {"name": Path(file).name, "sha256": sha256_of(file)}
    return {layer: values[name] for layer, name in names.items()}


def _said(what: str, names: Collection[str]) -> list[str]:
    return [f"{what} {listed(names)}"] if names else []
