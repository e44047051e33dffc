"""The header of a safetensors file: read with suspicion, written to the byte.

Format: 8 bytes little-endian length n, n bytes of JSON ``{name: {dtype, shape, data_offsets}, "__metadata__": {…}}``,
then the data; tensors cover it without gap or overlap (safetensors README, "Format").
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from json.encoder import encode_basestring as _to_json_string
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lrq.errors import InputError, printable, unique_keys

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element of every dtype of the format."""

METADATA = "__metadata__"
"""The key of a header that is no tensor's name."""
MAX_HEADER = 100_000_000
"""The limit of the safetensors library."""
MAX_DIMENSIONS = 64
"""The limit of torch's operations; it also bounds the digits of a size that a header can claim."""

FOREIGN = {
    b"PK\x03\x04": "a PyTorch or zip archive; save its tensors as safetensors first",
    b"\x80\x02": "a Python pickle, which can run code; save its tensors as safetensors first",
    b"GGUF": "a GGUF file; convert the high-precision safetensors original",
    b"version ": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<": "HTML or XML, as a page that says why a download failed; fetch the file itself",
    b"{": "JSON; of an index of shards, name the shards it lists",
}
"""What a file is by its first bytes, if the four after them are not all 0, as they are in a length below 2^32."""


class Entry(NamedTuple):
    """One tensor: ``begin`` and ``end`` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


_entry_of: Callable[[tuple[str, str, tuple[int, ...], int, int]], Entry] = partial(tuple.__new__, Entry)
"""As calling the class, without a call of Python for each of 100,000 tensors."""


@dataclass(frozen=True)
class Header:
    """Names, dtypes, shapes and places of all tensors, in the order of their data."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    data_start: int = 0
    """Bytes before the data."""

    @cached_property
    def data_size(self) -> int:
        """Bytes of data."""
        return max((entry.end for entry in self.entries), default=0)


@contextmanager
def paused_collection() -> Iterator[None]:
    """Without garbage collection, which would walk the many small objects of a large header or plan again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # There and back: what was made meanwhile is old from the start, and not walked at once.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def lay_out(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[Header, bytes]:
    """Place (name, dtype, shape) tensors one after the other; the header and its bytes.

    Wide dtypes come first, so that every tensor starts at a multiple of its element size: loaders that view the bytes
    need that. Within a dtype the given order stays.

    Raises:
        InputError: the header would be over :data:`MAX_HEADER`.
    """
    by_width: dict[int, list[tuple[str, str, tuple[int, ...]]]] = {}
    for tensor in tensors:
        by_width.setdefault(BITS[tensor[1]], []).append(tensor)
    entries: list[Entry] = []
    offset = 0
    # Written here, and once for every shape: a generic writer takes as long as all other planning of 100,000 tensors.
    records = [f'"{METADATA}":{_to_json(metadata)}'] if metadata else []
    known: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
    for name, dtype, shape in chain.from_iterable(by_width[width] for width in sorted(by_width, reverse=True)):
        kind = dtype, shape
        found = known.get(kind)
        if found is None:
            sides = ",".join(map(str, shape))
            found = tensor_size(dtype, shape), f':{{"dtype":"{dtype}","shape":[{sides}],"data_offsets":['
            known[kind] = found
        size, record = found
        end = offset + size
        entries.append(_entry_of((name, dtype, shape, offset, end)))
        records.append(f"{_to_json_string(name)}{record}{offset},{end}]}}")
        offset = end
    text = "{{{}}}".format(",".join(records)).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError(
            f"the output's header would take {len(text)} bytes, over the limit of {MAX_HEADER} that loaders have; "
            "the source has too many tensors, or names that are too long"
        )
    return Header(tuple(entries), metadata, 8 + len(text)), len(text).to_bytes(8, "little") + text


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def tensor_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return (math.prod(shape) * BITS[dtype] + 7) // 8


def read_header(file: BinaryIO, path: Path) -> tuple[Header, bytes]:
    """The header of an open file and its JSON bytes.

    Raises:
        InputError: not a safetensors file, truncated, or a header that contradicts itself or the file's size.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if size == 0:
        raise InputError(f"{path}: the file is empty")
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    foreign = next((what for start, what in FOREIGN.items() if prefix.startswith(start) and any(prefix[4:])), None)
    if foreign is not None:
        raise InputError(f"{path}: not a safetensors file, but {foreign}")
    if len(prefix) < 8 or length < 2 or length > max(MAX_HEADER, size):
        raise InputError(f"{path}: not a safetensors file (header length {length}, file size {size})")
    if length > MAX_HEADER:
        raise InputError(f"{path}: header of {length} bytes is over the limit of {MAX_HEADER}")
    if length > size - 8:
        raise InputError(f"{path}: not a safetensors file, or truncated (header of {length} bytes, file of {size})")
    text = file.read(length)
    with paused_collection():
        header = parse_header(text, path)
    missing = header.data_start + header.data_size - size
    if missing > 0:
        raise InputError(f"{path}: truncated, {missing} bytes are missing at the end; download or copy it again")
    if missing < 0:
        raise InputError(f"{path}: {-missing} bytes follow the last tensor; the header does not describe this file")
    return header, text


def parse_header(text: bytes, path: Path) -> Header:
    """The header from its JSON bytes; raises :class:`InputError`."""
    try:
        table = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file (header is not valid JSON: {_first_line(error)})") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: not a safetensors file (header is not a JSON object)")
    metadata = table.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: header: {METADATA} must map strings to strings")
    if not is_unicode("".join((*table, *metadata, *metadata.values()))):
        raise InputError(f"{path}: header: a name or a metadata value is not valid Unicode")
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    found = [_entry(name, record, path, sizes) for name, record in table.items()]
    entries = sorted(found, key=attrgetter("begin", "end"))
    offset = 0
    for entry in entries:
        if entry.begin != offset:
            problem = "overlaps the tensor before it" if entry.begin < offset else "leaves a gap before it"
            raise InputError(f"{path}: header: tensor {printable(entry.name)} {problem}")
        offset = entry.end
    return Header(tuple(entries), metadata, 8 + len(text))


def is_unicode(text: str) -> bool:
    """Whether it can be written: JSON and pickles may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Where(tuple):
    """Path and name of the tensor at fault, for an error: put into words only when there is one."""

    def __str__(self) -> str:
        return f"{self[0]}: header: tensor {printable(self[1])}"


def _entry(name: str, record: Any, path: Path, sizes: dict[tuple[str, tuple[int, ...]], int]) -> Entry:
    """One tensor; ``sizes`` holds the bytes of the shapes that were checked before."""
    where = _Where((path, name))
    if not isinstance(record, dict):
        raise InputError(f"{where}: not an object")
    dtype: Any = record.get("dtype")
    shape: Any = record.get("shape")
    offsets: Any = record.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where}: unknown dtype {printable(str(dtype))}")
    natural = isinstance(shape, list) and isinstance(offsets, list) and _naturals((*shape, *offsets))
    if not natural or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{where}: shape and data_offsets must be lists of natural numbers")
    kind = dtype, tuple(shape)
    size = sizes.get(kind)
    if size is None:
        size = sizes[kind] = tensor_size(dtype, shape)
    begin, end = offsets
    if end - begin != size:
        raise InputError(f"{where}: {dtype} {shape} takes {size} bytes, data_offsets give {end - begin}")
    return _entry_of((name, dtype, kind[1], begin, end))


def _naturals(values: tuple[Any, ...]) -> bool:
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0 and max(values, default=0) < 1 << 63


def _first_line(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0])
