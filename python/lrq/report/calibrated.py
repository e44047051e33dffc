"""Tensors that statistics of the inputs changed or added: what a file records of them, and what they must be."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from lrq.checkpoint.header import Entry
from lrq.checkpoint.reader import Reader
from lrq.dialects import comfyui
from lrq.errors import printable
from lrq.models.policy import FLOAT_DTYPES, SUFFIX
from lrq.plan import CALIBRATION, PROVENANCE


@dataclass(frozen=True)
class Changes:
    """Layers by what was done to them."""

    corrected: frozenset[str] = frozenset()
    """Their bias took the mean error."""
    added: frozenset[str] = frozenset()
    """They had no bias, and have one now."""
    input_scales: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()
    """Statistics of their inputs were there: if they were not rounded simply, codes and block scales follow those."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors that are not the source's."""
        biases = {f"{layer}.{comfyui.BIAS}" for layer in self.corrected | self.added}
        return frozenset(biases | {f"{layer}.{comfyui.INPUT_SCALE}" for layer in self.input_scales})


def recorded_changes(output: Reader) -> Changes:
    """What the file records; nothing where it records nothing that can be read."""
    try:
        entry = json.loads(output.header.metadata[PROVENANCE])[CALIBRATION]
        keys = ("corrected_biases", "added_biases", "input_scales", "measured_layers")
        return Changes(*(frozenset(map(str, entry.get(key, ()))) for key in keys))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return Changes()


def check_changes(output: Reader, source: Reader | None, changes: Changes, quantized: Collection[str]) -> Iterator[str]:
    """One line for everything that is not as recorded."""
    for layer in sorted((changes.corrected | changes.added | changes.input_scales) - set(quantized)):
        yield f"layer {printable(layer)}: has a corrected bias or an input scale, but is not quantized"
    for layer in sorted(changes.corrected | changes.added):
        name = f"{layer}.{comfyui.BIAS}"
        expected = None if source is None else _expected_bias(source, layer, layer in changes.added)
        yield from _check_bias(output, name, expected)
    for name, entry in output.entries.items():
        if name.endswith(f".{comfyui.INPUT_SCALE}") and name.rpartition(".")[0] in quantized:
            yield from _check_scale(output, entry)
    for layer in sorted(changes.input_scales):
        if f"{layer}.{comfyui.INPUT_SCALE}" not in output.entries:
            yield f"tensor {printable(layer)}.{comfyui.INPUT_SCALE}: is missing"


def _expected_bias(source: Reader, layer: str, added: bool) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape; None where the source has nothing to tell them from."""
    entry = source.entries.get(layer + (SUFFIX if added else f".{comfyui.BIAS}"))
    return None if entry is None else (entry.dtype, entry.shape[:1])


def _check_bias(output: Reader, name: str, expected: tuple[str, tuple[int, ...]] | None) -> Iterator[str]:
    entry, where = output.entries.get(name), f"tensor {printable(name)}"
    if entry is None:
        yield f"{where}: is missing"
    elif expected is not None and (entry.dtype, entry.shape) != expected:
        yield f"{where}: must be {expected[0]} {list(expected[1])}, is {entry.dtype} {list(entry.shape)}"
    elif entry.dtype not in FLOAT_DTYPES or not torch.isfinite(output.read(name)).all():
        yield f"{where}: is not finite"


def _check_scale(output: Reader, entry: Entry) -> Iterator[str]:
    where = f"tensor {printable(entry.name)}"
    if entry.dtype != "F32" or entry.shape not in ((), (1,)):
        yield f"{where}: must be F32 with one number, is {entry.dtype} {list(entry.shape)}"
        return
    value = output.read(entry.name).item()
    if not 0 < value < float("inf"):
        yield f"{where}: must be a positive number, is {value}"
