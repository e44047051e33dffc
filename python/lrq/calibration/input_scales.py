"""``input_scale``: what a loader divides a layer's inputs by before it rounds them to the format's grid."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lrq.calibration.inputs import InputStats
from lrq.errors import InputError, first_duplicate, printable, unique_keys, unread

SUFFIX = ".input_scale"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SMALLEST, LARGEST = 2.0**-126, 2.0**127
"""What float32 holds as a normal number."""


def input_scale(stats: InputStats, percent: float, largest: float) -> float:
    """The scale under which ``percent`` of the inputs' magnitudes reach ``largest`` at most.

    Args:
        percent: 100 takes the largest input; less, the upper edge of the bin of the histogram.
        largest: of the format: 448 for FP8, 448 · 6 for NVFP4.

    Returns:
        A positive number; 1 where all inputs are 0.
    """
    magnitude = stats.amax if percent >= 100 else stats.percentile(percent)
    return max(magnitude / largest, SMALLEST) if magnitude else 1.0


def read_input_scales(path: str | os.PathLike[str]) -> dict[str, float]:
    """Scale by layer, from JSON (``{"layer": 0.1}``) or the ``*.input_scale`` tensors of a safetensors file.

    Raises:
        InputError: the file can't be read, holds none, or one that is not a positive number.
    """
    file = Path(path)
    found = _from_json(file) if file.suffix == ".json" else _from_checkpoint(file)
    if not found:
        raise InputError(f"{file}: holds no input scale")
    for name, value in found.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and SMALLEST <= value <= LARGEST):
            said = printable(repr(value)[:40])
            raise InputError(f"{file}: layer {printable(name)}: its input scale must be a positive number, is {said}")
    scales = {name.removesuffix(SUFFIX): float(value) for name, value in found.items()}
    if len(scales) < len(found):
        twice = first_duplicate(name.removesuffix(SUFFIX) for name in found)
        raise InputError(f"{file}: layer {printable(twice)}: has two input scales, with and without {SUFFIX}")
    return scales


def _from_json(file: Path) -> dict[str, float]:
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON: {error}") from None
    if isinstance(table, dict) and "weight_map" in table:
        raise InputError(f"{file}: is an index of shards; name the shard that holds the input scales")
    if not isinstance(table, dict):
        raise InputError(f"{file}: must be a JSON object of input scales by layer")
    return table


def _from_checkpoint(file: Path) -> dict[str, float]:
    found = {}
    try:
        with safe_open(file, "pt") as source:
            for name in filter(lambda key: key.endswith(SUFFIX), source.keys()):
                tensor = source.get_tensor(name)
                if tensor.numel() != 1:
                    raise InputError(f"{file}: tensor {printable(name)} must hold one number, is {list(tensor.shape)}")
                if tensor.dtype not in FLOATS:
                    raise InputError(f"{file}: tensor {printable(name)} must be a float, is {tensor.dtype}")
                found[name] = float(tensor.item())
    except OSError as error:
        what = "is a folder" if file.is_dir() else f"can't be read: {error.strerror or unread(file)}"
        raise InputError(f"{file}: {what}") from None
    except SafetensorError as error:
        raise InputError(f"{file}: neither a .json nor a safetensors file: {printable(str(error))}") from None
    return found
