"""The tensors of a converted file that are not quantized: the source's, to the byte or rounded to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lrq.checkpoint.header import Entry
from lrq.checkpoint.layout import PROVENANCE
from lrq.checkpoint.reader import Reader
from lrq.dialects import comfyui
from lrq.errors import printable
from lrq.formats import bfloat16
from lrq.models.policy import FLOAT_DTYPES


@dataclass
class Unquantized:
    """What is expected of them, and how many are so."""

    quantized: set[str]
    """Layers whose tensors are others than the source's."""
    changed: frozenset[str]
    """Tensors that statistics changed."""
    dropped: frozenset[str] = frozenset()
    """Tensors that are left out."""
    bfloat16: frozenset[str] = frozenset()
    """Tensors that are rounded to bfloat16."""
    unchanged: int = 0
    rounded: int = 0


def kept_metadata(output: Reader, source: Reader) -> Iterator[str]:
    """Entries of the source's metadata that are not there; one line each."""
    for key, value in source.header.metadata.items():
        if key not in (comfyui.METADATA, PROVENANCE) and output.header.metadata.get(key) != value:
            yield f"header: the source's metadata {printable(key)} is missing or differs"


def compare(output: Reader, source: Reader, rest: Unquantized) -> Iterator[str]:
    """What is not as expected, one line each; counts those that are.

    Every tensor of the source must be there but for the dropped, unchanged unless quantized; nothing else may be.
    """
    written = {f"{name}.{suffix}" for name in rest.quantized for suffix in (*comfyui.STORED, comfyui.MARKER)}
    changed = set(rest.changed)
    for entry in source.header.entries:
        if entry.name in written and entry.dtype in FLOAT_DTYPES and entry.name.endswith(".weight"):
            changed.add(entry.name)
        mine, where = output.entries.get(entry.name), f"tensor {printable(entry.name)}"
        halved = entry.name in rest.bfloat16
        if mine is None:
            layer, _, suffix = entry.name.rpartition(".")
            if entry.name not in rest.dropped and (suffix not in comfyui.ACTIVATIONS or layer not in rest.quantized):
                yield f"{where}: is missing"
        elif entry.name in changed:
            continue
        elif (mine.dtype, mine.shape) != (bfloat16.CODE if halved else entry.dtype, entry.shape):
            wanted = f"should be {bfloat16.CODE}" if halved else f"was {entry.dtype}"
            yield f"{where}: {wanted} {list(entry.shape)}, is {mine.dtype} {list(mine.shape)}"
        elif halved and not _is_rounded(output, source, entry):
            yield f"{where}: is not the source's, rounded to bfloat16"
        elif not halved and any(a != b for a, b in zip(output.chunks(mine), source.chunks(entry), strict=True)):
            yield f"{where}: its bytes differ from the source's"
        elif halved:
            rest.rounded += 1
        else:
            rest.unchanged += 1
    for name in output.entries.keys() - source.entries.keys() - written - changed:
        yield f"tensor {printable(name)}: is not in the source and belongs to no quantized layer"


def _is_rounded(output: Reader, source: Reader, entry: Entry) -> bool:
    dtype, begin = bfloat16.WIDER[entry.dtype], 0
    for chunk in source.chunks(entry):
        try:
            half = bfloat16.round_in_place(torch.frombuffer(chunk, dtype=torch.uint8), dtype)
        except ValueError:
            return False
        stored = bytearray(half.numel())
        output.read_into(output.entries[entry.name], begin, memoryview(stored))
        if stored != half.numpy().tobytes():
            return False
        begin += half.numel()
    return True
