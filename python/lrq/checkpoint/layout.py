"""Which files an output is made of, and what they are called while they are not whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrq.checkpoint.header import Header, lay_out, tensor_size
from lrq.errors import InputError

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""
ENDING = ".safetensors"
INDEX = f"{ENDING}.index.json"
PROVENANCE = "lrq"
"""Key of the metadata under which an output says how it was made."""
_LONGEST_NAME = 255
"""Bytes of a name that common file systems take."""
_LONGEST_SUFFIX = len(".partial.journal")


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file, known to the byte but for its data."""

    path: Path
    header: Header
    header_bytes: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return self.header.data_start + self.header.data_size


@dataclass(frozen=True)
class Layout:
    """All files of an output."""

    target: Path
    """The name that appears last: the one file, or the index."""
    files: tuple[OutputFile, ...]
    index: bytes | None = None
    """Contents of the index, if there are shards."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files) + len(self.index or b"")

    @property
    def digest(self) -> str:
        """SHA-256 of all headers."""
        return hashlib.sha256(b"".join(file.header_bytes for file in self.files)).hexdigest()


def one_file(path: Path, header: Header, header_bytes: bytes) -> Layout:
    """An output of one file."""
    return Layout(path, (OutputFile(path, header, header_bytes),))


def in_shards(path: Path, groups: Sequence[Sequence[Tensor]], metadata: dict[str, str], limit: int) -> Layout:
    """An output of files ``<stem>-00001-of-00003.safetensors`` and an index, as Hugging Face names them.

    Args:
        path: the name of the output if it were one file; it is one where all fits.
        groups: tensors that stay together, in order: a layer with all that belongs to it.
        limit: bytes of a file; a larger group has a file of its own.
    """
    shards: list[list[Tensor]] = [[]]
    least = len(lay_out([], metadata)[1]) + _ROUNDED
    filled = least
    for group in groups:
        size = sum(tensor_size(dtype, shape) + _header_size(name, shape) for name, dtype, shape in group)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = least
        shards[-1] += group
        filled += size
    if len(shards) == 1:
        return one_file(path, *lay_out(shards[0], metadata))
    if len(shards) > 99_999:
        raise InputError(f"--shard_size {limit}: makes {len(shards)} files; choose a larger size")
    stem = path.name.removesuffix(INDEX).removesuffix(ENDING)
    files: list[OutputFile] = []
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}{ENDING}"
        files.append(OutputFile(path.with_name(name), *lay_out(shard, metadata)))
        places |= dict.fromkeys((tensor[0] for tensor in shard), name)
    total = sum(file.header.data_size for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return Layout(path.with_name(stem + INDEX), tuple(files), (json.dumps(index, indent=2) + "\n").encode())


_ROUNDED = 8
"""Bytes by which a header may be filled up."""
_RECORD = len(',"":{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]}') + 2 * len(str(1 << 50))
_ESCAPED = 6
"""Bytes of a character of a name in JSON, at most."""


def _header_size(name: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a header, at most."""
    plain = len(name) if name.isascii() and name.isprintable() else _ESCAPED * len(name)
    return _RECORD + plain + name.count('"') + name.count("\\") + len(str(shape))


def partial_of(path: Path) -> Path:
    """The name of a file that is not whole yet; a name too long for the ending is cut, the same way every time."""
    name = path.name
    if len(os.fsencode(name)) + _LONGEST_SUFFIX > _LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{os.fsencode(name)[:200].decode('utf-8', 'ignore')}~{digest}"
    return path.with_name(f"{name}.partial")
