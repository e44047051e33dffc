"""What numbers may be: every format is one record in one file and one line in these tables."""

from __future__ import annotations

from typing import Any

from lrq.formats.format import QUANTOPS, STOCK, Format, Shape, Tensors
from lrq.formats.fp8 import Fp8
from lrq.formats.int8 import Int8
from lrq.formats.mxfp8 import Mxfp8
from lrq.formats.nvfp4 import Nvfp4

__all__ = ["FORMATS", "QUANTOPS", "STOCK", "Format", "Shape", "Tensors", "read_format"]

FORMATS: dict[str, Format] = {
    "fp8": Fp8("tensor"),
    "fp8-row": Fp8("row"),
    "fp8-block": Fp8("block", 64),
    "int8-tensor": Int8("tensor"),
    "int8-row": Int8("row"),
    "int8-block": Int8("block", 128),
    "int8-row-convrot": Int8("row", 0, 256),
    "nvfp4": Nvfp4(),
    "mxfp8": Mxfp8(),
}
"""Every format with its usual parameters."""

_BY_MARKER: dict[str, type[Format]] = {
    "float8_e4m3fn": Fp8,
    "float8_e4m3fn_rowwise": Fp8,
    "float8_e4m3fn_blockwise": Fp8,
    "int8_tensorwise": Int8,
    "int8_blockwise": Int8,
    "nvfp4": Nvfp4,
    "mxfp8": Mxfp8,
}


def read_format(marker: dict[str, Any], tensors: dict[str, Shape]) -> Format:
    """The format of a stored layer from its marker and the shapes of its tensors by suffix.

    Raises:
        ValueError: unknown format, a missing tensor, or shapes that contradict the marker.
    """
    name = marker.get("format")
    if not isinstance(name, str) or name not in _BY_MARKER:
        raise ValueError(f"unknown format {name!r}")
    missing = {"weight", "weight_scale"} - tensors.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return _BY_MARKER[name].read(marker, tensors)
