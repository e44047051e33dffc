"""What happens to each tensor, decided from names and shapes before a byte moves."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache

from lrq.checkpoint.header import Entry, Header, first_duplicate, lay_out
from lrq.checkpoint.reader import CODES, Reader
from lrq.config import Conversion, Storage
from lrq.dialects import comfyui
from lrq.errors import InputError, printable
from lrq.formats import Format, Shape
from lrq.formats.fp8 import Fp8
from lrq.formats.int8 import Int8
from lrq.formats.mxfp8 import Mxfp8
from lrq.formats.nvfp4 import Nvfp4
from lrq.models.policy import FLOAT_DTYPES, SUFFIX, load_policy
from lrq_kernels._version import __version__

PROVENANCE = "lrq"
"""Header entry that says how the file was made."""
CONVROT_GROUPS = (256, 64)
"""Groups tried when none is asked for."""


@dataclass(frozen=True)
class Layer:
    """A weight that is quantized."""

    name: str
    """Module name L; the weight is ``L.weight``."""
    source: Entry
    format: Format

    @property
    def marker(self) -> dict[str, object]:
        """The keys of its markers."""
        return comfyui.layer_marker(self.format, self.source.shape)


@dataclass(frozen=True)
class Plan:
    """Decisions and the exact layout of the output."""

    layers: tuple[Layer, ...]
    kept: dict[str, str]
    """Reason by tensor, for weights that stay as they are though they look like linear layers, and all the others."""
    refused: dict[str, str]
    """Reason by tensor, for weights whose shape the format can't take."""
    copied: tuple[Entry, ...]
    """Source tensors that are copied byte for byte."""
    dropped: tuple[Entry, ...]
    """Source tensors that are left out: beside a quantized weight they would mean something else."""
    header: Header
    header_bytes: bytes

    @property
    def output_size(self) -> int:
        """Bytes of the output file."""
        return self.header.data_start + self.header.data_size


@cache
def _layout(fmt: Format, shape: Shape) -> list[tuple[str, str, Shape]]:
    return [(suffix, CODES[dtype], stored) for suffix, (dtype, stored) in fmt.layout(shape).items()]


def make_plan(source: Reader, conversion: Conversion) -> Plan:
    """Plan the conversion of an open checkpoint.

    Raises:
        InputError: a bad expression, names that collide, or nothing to quantize.
    """
    conversion.check()
    _refuse_legacy(source)
    excluded = _compile_excluded(conversion.exclude_layers)
    kept = load_policy().refusals(source.header.entries)
    refused: dict[str, str] = {}
    layers = []
    for entry in source.header.entries:
        if entry.name in kept:
            continue
        name = entry.name.removesuffix(SUFFIX)
        if excluded is not None and excluded.search(name):
            kept[entry.name] = "excluded by --exclude_layers"
            continue
        chosen = choose_format(conversion.storage, entry.shape)
        if isinstance(chosen, str):
            refused[entry.name] = chosen
        else:
            layers.append(Layer(name, entry, chosen))
    if excluded is not None and not any(excluded.search(name) for name in _modules(source)):
        raise InputError(f"--exclude_layers {printable(conversion.exclude_layers or '')}: finds no layer to exclude")
    if not layers:
        raise InputError(f"{source.path}: no layer can be quantized ({_why_none(source, kept, refused)})")
    return _assemble(source, conversion, tuple(layers), kept, refused)


def choose_format(storage: Storage, shape: Shape) -> Format | str:
    """The format of a weight of this shape, or why it can't take it."""
    candidates: list[Format]
    if storage.family == "nvfp4":
        candidates = [Nvfp4()]
    elif storage.family == "mxfp8":
        candidates = [Mxfp8()]
    elif storage.family == "fp8":
        candidates = [Fp8(storage.scaling, (storage.block_size or 64) if storage.scaling == "block" else 0)]
    elif storage.convrot:
        groups = CONVROT_GROUPS if storage.convrot_group_size is None else (storage.convrot_group_size,)
        candidates = [Int8("row", 0, group) for group in groups]
    else:
        candidates = [Int8(storage.scaling, (storage.block_size or 128) if storage.scaling == "block" else 0)]
    reasons = [candidate.refusal(shape) for candidate in candidates]
    accepted = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if reason is None]
    return accepted[0] if accepted else str(reasons[-1])


def _compile_excluded(expression: str | None) -> re.Pattern[str] | None:
    if expression is None:
        return None
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"--exclude_layers {printable(expression)}: not a regular expression: {error}") from None


def _modules(source: Reader) -> list[str]:
    return [entry.name.removesuffix(SUFFIX) for entry in source.header.entries if entry.name.endswith(SUFFIX)]


def _refuse_legacy(source: Reader) -> None:
    """ComfyUI reads the scales of a ``scaled_fp8`` file only where the header has no markers."""
    for name in source.entries:
        if name.rpartition(".")[2] == comfyui.LEGACY:
            raise InputError(
                f"{source.path}: tensor {printable(name)}: quantized already, in the legacy scaled_fp8 layout; "
                "convert the high-precision original"
            )


def _why_none(source: Reader, kept: dict[str, str], refused: dict[str, str]) -> str:
    matrices = [e.name for e in source.header.entries if e.name.endswith(SUFFIX) and len(e.shape) >= 2]
    reasons = sorted({{**kept, **refused}[name] for name in matrices})
    return "; ".join(reasons) if reasons else "it holds no 2-D *.weight tensor"


def _assemble(
    source: Reader, conversion: Conversion, layers: tuple[Layer, ...], kept: dict[str, str], refused: dict[str, str]
) -> Plan:
    planned = {layer.source.name: layer for layer in layers}
    markers = source_markers(source, frozenset(layer.name for layer in layers))
    _refuse_unmarked(source, markers)
    tensors: list[tuple[str, str, Shape]] = []
    copied, dropped = [], []
    foreign = {f"{layer.name}.{suffix}" for layer in layers for suffix in comfyui.ACTIVATIONS}
    for entry in source.header.entries:
        layer = planned.get(entry.name)
        if entry.name in foreign:
            dropped.append(entry)
            continue
        if layer is None:
            copied.append(entry)
            tensors.append((entry.name, entry.dtype, entry.shape))
            continue
        markers[layer.name] = layer.marker
        stored = _layout(layer.format, entry.shape)
        tensors += [(f"{layer.name}.{suffix}", dtype, shape) for suffix, dtype, shape in stored]
        marker_size = comfyui.marker_tensor(layer.marker).numel()
        tensors.append((f"{layer.name}.{comfyui.MARKER}", "U8", (marker_size,)))
    names = [name for name, _, _ in tensors]
    if len(set(names)) != len(names):
        twice = printable(first_duplicate(names))
        raise InputError(f"{source.path}: tensor {twice} stands in the way of a quantized layer")
    metadata = {key: value for key, value in source.header.metadata.items() if key != comfyui.METADATA}
    metadata[comfyui.METADATA] = comfyui.metadata_entry(markers)
    metadata[PROVENANCE] = _provenance(source, conversion)
    header, header_bytes = lay_out(tensors, metadata)
    return Plan(layers, kept, refused, tuple(copied), tuple(dropped), header, header_bytes)


def _refuse_unmarked(source: Reader, markers: comfyui.Markers) -> None:
    for name in source.entries:
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight_scale" and layer not in markers:
            raise InputError(
                f"{source.path}: layer {printable(layer)}: quantized already, but without a marker that says how; "
                "convert the high-precision original"
            )


def source_markers(source: Reader, planned: frozenset[str] = frozenset()) -> comfyui.Markers:
    """Markers of layers that come quantized and stay so; a stale entry, of a layer that is not, is dropped."""
    try:
        stated = comfyui.read_metadata_entry(source.header.metadata)
    except ValueError:
        stated = {}
    markers: comfyui.Markers = {}
    for entry in source.header.entries:
        name, _, suffix = entry.name.rpartition(".")
        if suffix == comfyui.MARKER and name not in planned:
            markers[name] = stated.get(name) or _marker_of(source, entry, name)
        elif suffix == "weight" and entry.dtype not in FLOAT_DTYPES and name in stated:
            markers.setdefault(name, stated[name])
    return {name: marker for name, marker in markers.items() if name not in planned}


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


def _provenance(source: Reader, conversion: Conversion) -> str:
    return json.dumps(
        {
            "version": __version__,
            "settings": conversion.settings(),
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
