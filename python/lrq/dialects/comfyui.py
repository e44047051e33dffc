"""ComfyUI's names and markers (docs/FORMATS.md section 1).

Marker A is the tensor ``L.comfy_quant``: the UTF-8 bytes of a JSON object. Marker B is the header entry
``_quantization_metadata``: a JSON string with the same keys for every layer. B wins over A, so both always agree.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from lrq.formats import STOCK, Format, Shape

MARKER = "comfy_quant"
METADATA = "_quantization_metadata"
VERSION = "1.0"
"""Of the layout of that entry."""
LEGACY = "scaled_fp8"
"""Last part of the key that marks a file of the older layout."""
STORED = ("weight", "weight_scale", "weight_scale_2")
"""Suffixes of the tensors that lrq writes for a layer, besides the marker."""
INPUT_SCALE, BIAS = "input_scale", "bias"
WRITTEN = (*STORED, MARKER, INPUT_SCALE, BIAS)
ACTIVATIONS = (INPUT_SCALE, "pre_quant_scale")
"""Suffixes that change what a quantized layer does to its input, and mean nothing beside a weight that is not."""
COUNTS = ("convrot_groupsize", "group_size", "num_experts")
"""Marker keys whose values are positive integers."""
LARGEST_INPUT = {"float8_e4m3fn": 448.0, "nvfp4": 448.0 * 6.0}
"""Formats whose layers may have an input_scale, and the magnitude that the largest input is scaled to."""
Markers = dict[str, dict[str, Any]]
"""Marker keys by layer."""


def layer_marker(fmt: Format, shape: Shape, full_precision: bool = False) -> dict[str, Any]:
    """The marker of one layer of weight [N,K] or [E,N,K]; ``full_precision``: the loader multiplies in 16 bits."""
    keys = fmt.marker() | ({"num_experts": shape[0]} if len(shape) == 3 else {})
    return keys | {"full_precision_matrix_mult": True} if full_precision else keys


def largest_input(fmt: Format, shape: Shape) -> float | None:
    """What input_scale scales the largest input of a layer to; None where the loader takes no input_scale."""
    return LARGEST_INPUT.get(str(fmt.marker()["format"])) if len(shape) == 2 else None


def full_precision_reason(fmt: Format, shape: Shape) -> str | None:
    """Why ComfyUI dequantizes a layer of weight [N,K] instead of multiplying in low precision; None if it does not.

    Sections 2 and 3 of the on-disk contract; ``torch._int_mm`` takes multiples of 8.
    """
    rows, columns = shape[-2:]
    if fmt.loader != STOCK:
        return f"{fmt.name} is read by a custom node"
    name = str(fmt.marker()["format"])
    if name == "nvfp4" and -(-columns // 16) * 16 % 32:
        return f"K padded to 16 must be a multiple of 32, got {-(-columns // 16) * 16}"
    multiple = {"float8_e4m3fn": 16, "int8_tensorwise": 8}.get(name, 1)
    if rows % multiple or columns % multiple:
        return f"N and K must be multiples of {multiple}, got {rows} x {columns}"
    return None


def check_marker(marker: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a value can't be what its key means."""
    for key in COUNTS:
        value = marker.get(key, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} of its marker must be a positive integer, got {value!r}")
    if not isinstance(marker.get("convrot", False), bool):
        raise ValueError(f"convrot of its marker must be true or false, got {marker['convrot']!r}")


def marker_tensor(marker: dict[str, Any]) -> torch.Tensor:
    """Marker A, uint8."""
    return torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)


def metadata_entry(markers: Markers) -> str:
    """Marker B."""
    return json.dumps({"format_version": VERSION, "layers": markers})


def read_marker_tensor(data: bytes) -> dict[str, Any]:
    """The keys of marker A.

    Raises:
        ValueError: not the UTF-8 bytes of a JSON object.
    """
    try:
        marker = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(marker, dict):
        raise ValueError("is not a JSON object")
    return marker


def read_metadata_entry(metadata: dict[str, str]) -> Markers:
    """The layers of marker B, empty if there is none.

    Raises:
        ValueError: the entry is not what section 1 describes.
    """
    if METADATA not in metadata:
        return {}
    try:
        table = json.loads(metadata[METADATA])
        layers = table["layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{METADATA} is not a JSON object with layers") from None
    if table.get("format_version", VERSION) != VERSION:
        raise ValueError(f"{METADATA}: format_version must be {VERSION}, is {table['format_version']!r}")
    if not isinstance(layers, dict) or not all(isinstance(marker, dict) for marker in layers.values()):
        raise ValueError(f"{METADATA}: layers must map names to objects")
    return layers
