"""lrq turns safetensors checkpoints into FP8, INT8, NVFP4 or MXFP8 files that ComfyUI loads.

:func:`quantize` converts a file, :func:`verify` checks one; ``pack_*``, ``unpack_*`` and :func:`quantize_layers` work
on tensors. Importing this
package does not import torch; the first use of a function does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lrq_kernels._version import __version__

if TYPE_CHECKING:
    from lrq.config import Conversion
    from lrq.errors import InputError
    from lrq.execution import Execution
    from lrq.learning import quantize_layers
    from lrq.packing import (
        Fp8Weight,
        Int8Weight,
        Mxfp8Weight,
        Nvfp4Weight,
        pack_fp8,
        pack_int8,
        pack_mxfp8,
        pack_nvfp4,
        unpack_fp8,
        unpack_int8,
        unpack_mxfp8,
        unpack_nvfp4,
    )
    from lrq.run import quantize, verify

_HOME = {
    "quantize": "run",
    "verify": "run",
    "Conversion": "config",
    "InputError": "errors",
    "Execution": "execution",
    "quantize_layers": "learning",
    "pack_nvfp4": "packing",
    "pack_mxfp8": "packing",
    "pack_fp8": "packing",
    "pack_int8": "packing",
    "unpack_nvfp4": "packing",
    "unpack_mxfp8": "packing",
    "unpack_fp8": "packing",
    "unpack_int8": "packing",
    "Nvfp4Weight": "packing",
    "Mxfp8Weight": "packing",
    "Fp8Weight": "packing",
    "Int8Weight": "packing",
}

__all__ = [
    "Conversion",
    "Execution",
    "Fp8Weight",
    "InputError",
    "Int8Weight",
    "Mxfp8Weight",
    "Nvfp4Weight",
    "__version__",
    "pack_fp8",
    "pack_int8",
    "pack_mxfp8",
    "pack_nvfp4",
    "quantize",
    "quantize_layers",
    "unpack_fp8",
    "unpack_int8",
    "unpack_mxfp8",
    "unpack_nvfp4",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"lrq.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
