"""What happens to each tensor, decided from names and shapes before a byte moves."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from lrq.checkpoint.header import Entry, Header, lay_out, paused_collection
from lrq.checkpoint.layout import PROVENANCE
from lrq.checkpoint.reader import CODES, Reader
from lrq.config import Conversion
from lrq.dialects import comfyui
from lrq.errors import InputError, counted, first_duplicate, listed, printable
from lrq.formats import Shape, bfloat16
from lrq.models.lora import lora_factors
from lrq.models.policy import FLOAT_DTYPES, SUFFIX
from lrq.models.preset import Preset
from lrq.models.recognition import Part
from lrq.selection.decide import Decisions, decide
from lrq.selection.inputs import Inputs, use_inputs
from lrq.selection.layer import Layer
from lrq.selection.policies import describe
from lrq_kernels._version import __version__

CALIBRATION = "calibration"
"""Key of the provenance that says what was made of statistics."""
PATCHES = "patched_scales"
"""Key of that: input scales that ``lrq actscale`` gave, by the statistics and the percentile that it took."""
MOST_REASONS = 3
"""Reasons that are named where nothing can be quantized."""
_NUMBERS = re.compile(r"\d+(?:\.\d+)?")
ACTS_ON_THE_LAYER = "it would act on the quantized layer"


@dataclass(frozen=True)
class Plan:
    """Decisions and the exact layout of the output."""

    layers: tuple[Layer, ...]
    """In the order of the source."""
    kept: dict[str, str]
    """Reason by tensor, for weights that stay as they are though they look like linear layers, and all the others."""
    refused: dict[str, str]
    """Reason by tensor, for weights whose shape the format can't take."""
    bfloat16: dict[str, str]
    """Reason by tensor, for weights that are not quantized, but stored in bfloat16."""
    copied: tuple[Entry, ...]
    """Source tensors that are copied: those of :attr:`bfloat16` rounded, all others byte for byte."""
    dropped: tuple[Entry, ...]
    """Source tensors that are left out."""
    why_dropped: dict[str, str]
    """Reason by tensor."""
    parts: tuple[Part, ...]
    """The models of the checkpoint, recognised or not."""
    policies: dict[str, str]
    """What is kept where: names of the presets, by prefix of the part."""
    presets: dict[str, tuple[Preset, ...]]
    """The same as presets; none where the generic policy holds."""
    source: Path
    """What messages name."""
    inputs: Inputs
    """Statistics of the layers' inputs, and what follows from them."""
    outdone: tuple[str, ...]
    """Rules of the user's that have no effect, one line each."""
    header: Header
    header_bytes: bytes

    @property
    def output_size(self) -> int:
        """Bytes of the output file."""
        return self.header.data_start + self.header.data_size


def _stored(layer: Layer) -> list[tuple[str, str, Shape]]:
    """Suffix, dtype and shape of every tensor that stands for a layer."""
    layout = layer.format.layout(layer.source.shape)
    stored = [(f".{suffix}", CODES[dtype], shape) for suffix, (dtype, shape) in layout.items()]
    if layer.corrects is not None:
        stored.append((f".{comfyui.BIAS}", layer.corrects, layer.source.shape[:1]))
    if layer.input_scale is not None:
        stored.append((f".{comfyui.INPUT_SCALE}", "F32", ()))
    return [*stored, (f".{comfyui.MARKER}", "U8", (comfyui.marker_tensor(layer.marker).numel(),))]


def make_plan(
    source: Reader, conversion: Conversion, allow_empty: bool = False, decisions: Decisions | None = None
) -> Plan:
    """Plan the conversion of an open checkpoint.

    Args:
        allow_empty: plan a copy where no layer can be quantized, instead of raising an error.
        decisions: those of this conversion, where they are known already.

    Raises:
        InputError: a bad rule, names that collide, or nothing to quantize.
    """
    conversion.check()
    _refuse_legacy(source)
    _refuse_lora(source)
    with paused_collection():
        decisions = decisions or decide(source.entries, conversion, str(source.path))
        if not decisions.layers and not allow_empty:
            raise nothing_to_quantize(source, decisions, conversion)
        # Decided model by model, read in the order of the file.
        layers = sorted(decisions.layers, key=lambda layer: layer.source.begin)
        return _assemble(source, conversion, tuple(layers), decisions)


def _refuse_legacy(source: Reader) -> None:
    """ComfyUI reads the scales of a ``scaled_fp8`` file only where the header has no markers."""
    for name in source.entries:
        if name.rpartition(".")[2] == comfyui.LEGACY:
            raise InputError(
                f"{source.path}: tensor {printable(name)}: quantized already, in the legacy scaled_fp8 layout; "
                "convert the high-precision original"
            )


def _refuse_lora(source: Reader) -> None:
    """Its factors are matrices, but no loader reads quantized ones."""
    factors = lora_factors(source.entries)
    if factors:
        raise InputError(
            f"{source.path}: is a LoRA ({listed(factors)}), not a checkpoint; merge it into its model and convert "
            "that, or load it as it is beside the converted model"
        )


def nothing_to_quantize(source: Reader, made: Plan | Decisions, conversion: Conversion) -> InputError:
    """The error of a checkpoint that no conversion can be made of: how many matrices stay, and why."""
    matrices = [e.name for e in source.header.entries if e.name.endswith(SUFFIX) and len(e.shape) >= 2]
    why = {**made.kept, **made.refused, **made.bfloat16}
    # Reasons that differ in nothing but numbers are one.
    alike: dict[str, list[str]] = {}
    for name in matrices:
        if name in why:
            alike.setdefault(_NUMBERS.sub("#", why[name]), []).append(why[name])
    kinds = sorted(alike.values(), key=len, reverse=True)
    reasons = [f"{counted(len(kind), 'layer')}: {kind[0]}" for kind in kinds[:MOST_REASONS]]
    reasons += ["..."] * (len(kinds) > MOST_REASONS)
    model = f"; the model is {describe(made.parts)}" if conversion.selection.preset else ""
    model += "; choose a smaller --target_bits" if conversion.selection.target_bits is not None else ""
    why_none = "; ".join(reasons) or "it holds no 2-D *.weight tensor"
    return InputError(f"{source.path}: no layer can be quantized ({why_none}){model}")


def _assemble(source: Reader, conversion: Conversion, layers: tuple[Layer, ...], decisions: Decisions) -> Plan:
    planned = {layer.source.name: layer for layer in layers}
    markers = source_markers(source, frozenset(layer.name for layer in layers), decisions.dropped.keys())
    _refuse_unmarked(source, markers, decisions.dropped.keys())
    tensors: list[tuple[str, str, Shape]] = []
    copied, dropped = [], []
    inputs = use_inputs(layers, source, conversion.calibration)
    moved = {f"{layer.name}.{comfyui.BIAS}" for layer in layers if layer.corrects is not None}
    known: dict[tuple[object, ...], tuple[dict[str, object], list[tuple[str, str, Shape]]]] = {}
    parts = [name.rpartition(".") for name in source.entries if name.endswith(comfyui.ACTIVATIONS)]
    foreign = [
        f"{name}.{suffix}" for name, _, suffix in parts if suffix in comfyui.ACTIVATIONS and name + SUFFIX in planned
    ]
    why_dropped = decisions.dropped | dict.fromkeys(foreign, ACTS_ON_THE_LAYER)
    for entry in source.header.entries:
        layer = planned.get(entry.name)
        if layer is not None:
            kind = layer.format, entry.shape, layer.full_precision, layer.corrects, layer.input_scale is None
            if kind not in known:
                known[kind] = layer.marker, _stored(layer)
            markers[layer.name], stored = known[kind]
            for suffix, dtype, shape in stored:
                tensors.append((layer.name + suffix, dtype, shape))
        elif entry.name in moved:
            continue
        elif entry.name in why_dropped:
            dropped.append(entry)
        else:
            copied.append(entry)
            dtype = bfloat16.CODE if entry.name in decisions.bfloat16 else entry.dtype
            tensors.append((entry.name, dtype, entry.shape))
    if len({tensor[0] for tensor in tensors}) != len(tensors):
        twice = printable(first_duplicate(name for name, _, _ in tensors))
        raise InputError(f"{source.path}: tensor {twice} stands in the way of a quantized layer")
    metadata = {key: value for key, value in source.header.metadata.items() if key != comfyui.METADATA}
    metadata[comfyui.METADATA] = comfyui.metadata_entry(markers)
    metadata[PROVENANCE] = _provenance(source, conversion, decisions, inputs)
    header, header_bytes = lay_out(tensors, metadata)
    policies = {prefix: policy.about for prefix, policy in decisions.policies.items()}
    return Plan(
        layers,
        decisions.kept,
        decisions.refused,
        decisions.bfloat16,
        tuple(copied),
        tuple(dropped),
        {entry.name: why_dropped[entry.name] for entry in dropped},
        tuple(decisions.parts),
        policies,
        {prefix: policy.presets for prefix, policy in decisions.policies.items()},
        source.path,
        inputs,
        decisions.outdone,
        header,
        header_bytes,
    )


def _refuse_unmarked(source: Reader, markers: comfyui.Markers, dropped: Container[str]) -> None:
    for name in source.entries:
        if name.endswith(".weight_scale") and name not in dropped and name.rpartition(".")[0] not in markers:
            layer = name.rpartition(".")[0]
            raise InputError(
                f"{source.path}: layer {printable(layer)}: quantized already, but without a marker that says how; "
                "convert the high-precision original"
            )


def source_markers(
    source: Reader, planned: Container[str] = frozenset(), dropped: Container[str] = frozenset()
) -> comfyui.Markers:
    """Markers of layers that come quantized and stay so; a stale entry, of a layer that is not, is dropped."""
    try:
        stated = comfyui.read_metadata_entry(source.header.metadata)
    except ValueError:
        stated = {}
    markers: comfyui.Markers = {}
    for entry in source.header.entries:
        if entry.name.endswith(f".{comfyui.MARKER}"):
            name = entry.name.rpartition(".")[0]
            if name not in planned and entry.name not in dropped:
                markers[name] = stated.get(name) or _marker_of(source, entry, name)
        elif stated and entry.name.endswith(SUFFIX) and entry.dtype not in FLOAT_DTYPES and entry.name not in dropped:
            name = entry.name.removesuffix(SUFFIX)
            if name in stated and name not in planned:
                markers.setdefault(name, stated[name])
    return markers


def _marker_of(source: Reader, entry: Entry, name: str) -> dict[str, object]:
    try:
        marker = comfyui.read_marker_tensor(b"".join(source.chunks(entry)))
        if not isinstance(marker.get("format"), str):
            raise ValueError("names no format")
    except ValueError as error:
        raise InputError(
            f"{source.path}: layer {printable(name)}: quantized already, but its {comfyui.MARKER} {error}; "
            "convert the high-precision original"
        ) from None
    return marker


def _provenance(source: Reader, conversion: Conversion, decisions: Decisions, inputs: Inputs) -> str:
    models = [
        {
            "prefix": part.prefix,
            "family": part.family or None,
            "preset": None if part.preset is None else part.preset.name,
            "policy": decisions.policies[part.prefix].about,
        }
        for part in decisions.parts
    ]
    return json.dumps(
        {
            "version": __version__,
            "settings": conversion.settings(),
            "models": models,
            **({CALIBRATION: inputs.provenance} if inputs.provenance else {}),
            "source": {"name": source.path.name, "size": source.size, "header_sha256": source.header_sha256},
        }
    )


def recorded(provenance: str | None, of_this_version: bool = False) -> Conversion | None:
    """The settings that a file records; None where it records none that this version knows."""
    try:
        entry = json.loads(provenance or "")
        if of_this_version and entry["version"] != __version__:
            return None
        return Conversion.from_settings(entry["settings"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
