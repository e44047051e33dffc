"""A checkpoint of one file or many, read by the part: never more in memory than what is asked for."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lrq.checkpoint import disk
from lrq.checkpoint.header import Entry, Header, read_header
from lrq.checkpoint.layout import ENDING, INDEX
from lrq.checkpoint.sources import PICKLES, Source, find_source
from lrq.errors import InputError, UnfinishedError, printable

CHUNK = 1 << 24
"""Bytes of one copy step."""
_ALIGNMENT = 64

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
"""safetensors code of a torch dtype."""


class Reader:
    """An open checkpoint; use it in a ``with`` statement. Parts can be read from many threads.

    Args:
        path: a ``.safetensors`` file, an index of shards, a folder in Hugging Face or diffusers layout, a glob of
            shards, or a PyTorch file that holds nothing but tensors.

    The data of shards counts as one: ``begin`` and ``end`` of an entry are as if one file held them all.

    Raises:
        InputError: missing, unreadable or malformed file, or one that changed under the reader.
    """

    header: Header
    stem: Path
    """What outputs are named after: the source's name without its ending."""

    _source: Source

    def __new__(cls, path: str | os.PathLike[str]) -> Reader:
        source = find_source(path)
        if cls is Reader and source.files[0].name.endswith(PICKLES):
            from lrq.checkpoint.pickled import PickleReader

            cls = PickleReader
        reader = super().__new__(cls)
        reader._source = source
        return reader

    def __init__(self, path: str | os.PathLike[str]) -> None:
        source = self._source
        self.path, self.stem = source.path, source.stem
        self._paths = source.files
        self._files: list[Any] = []
        self._starts: list[int] = []
        self._data_starts: list[int] = []
        try:
            self._open(source)
        except BaseException:
            self._close()
            raise
        self.entries = {entry.name: entry for entry in self.header.entries}

    def _open(self, source: Source) -> None:
        headers: list[tuple[Path, Header]] = []
        digest = hashlib.sha256()
        end = 0
        for path in source.files:
            header, text = self._opened(path)
            headers.append((path, header))
            digest.update(text)
            # As far from a multiple of any element's size as it is in its file.
            start = -(-end // _ALIGNMENT) * _ALIGNMENT + header.data_start % _ALIGNMENT
            self._starts.append(start if len(source.files) > 1 else 0)
            self._data_starts.append(header.data_start)
            end = self._starts[-1] + header.data_size
        self.header_sha256 = digest.hexdigest()
        source.check(headers)
        if len(headers) == 1:
            self.header = headers[0][1]
            return
        entries = [
            Entry(entry.name, entry.dtype, entry.shape, entry.begin + start, entry.end + start)
            for start, (_, header) in zip(self._starts, headers, strict=True)
            for entry in header.entries
        ]
        metadata = {key: value for _, header in headers for key, value in header.metadata.items()}
        self.header = Header(tuple(entries), metadata, 0)

    def _opened(self, path: Path) -> tuple[Header, bytes]:
        try:
            self._files.append(path.open("rb", buffering=0))
        except OSError as error:
            index = path.with_name(path.name.removesuffix(ENDING) + INDEX)
            hint = f"; it is in shards: name {index.name}" if index.exists() else ""
            raise InputError(f"{path}: can't be opened: {error.strerror}{hint}") from None
        try:
            return read_header(self._files[-1], path)
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror}") from None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read."""
        return self._paths

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(os.fstat(file.fileno()).st_size for file in self._files)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells whether these are the same files: names, sizes, times and headers."""
        stats = [os.fstat(file.fileno()) for file in self._files]
        return {
            "the source's name": self.path.name,
            "the source's size": [stat.st_size for stat in stats],
            "the source's time of change": [stat.st_mtime_ns for stat in stats],
            "the source's header": self.header_sha256,
        }

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU."""
        entry = self.entries[name]
        data = torch.empty(entry.size, dtype=torch.uint8)
        self.read_into(entry, 0, data.numpy().data)
        return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, entry: Entry) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces of at most :data:`CHUNK`."""
        for begin in range(0, entry.size, CHUNK):
            piece = memoryview(bytearray(min(CHUNK, entry.size - begin)))
            self.read_into(entry, begin, piece)
            yield piece

    def read_into(self, entry: Entry, begin: int, view: memoryview) -> None:
        """Fill ``view`` with bytes of a tensor, ``begin`` counted from its start."""
        if not len(view):
            return
        file, offset = self._place(entry, begin)
        try:
            count = disk.read_at(self._files[file].fileno(), view, offset)
        except OSError as error:
            raise UnfinishedError(f"{self._paths[file]}: can't be read: {error.strerror}") from None
        if count < len(view):
            name = printable(entry.name)
            raise InputError(f"{self._paths[file]}: ended inside tensor {name}; it changed while being read")

    def forget(self, entry: Entry, begin: int, size: int) -> None:
        """The page cache needs these bytes no more."""
        file, offset = self._place(entry, begin)
        disk.forget(self._files[file].fileno(), offset, size)

    def _place(self, entry: Entry, begin: int) -> tuple[int, int]:
        # Of files that start at one place all but the last are empty; so is an entry at the end.
        file = bisect.bisect_right(self._starts, entry.begin) - 1
        return file, self._data_starts[file] + entry.begin - self._starts[file] + begin

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
