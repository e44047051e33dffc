"""One safetensors file, read by the tensor: never more in memory than what is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

from lrq.checkpoint.header import Entry, Header, read_header
from lrq.errors import InputError, printable

CHUNK = 1 << 24
"""Bytes of one copy step."""

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
    """An open checkpoint; use it in a ``with`` statement.

    Raises:
        InputError: missing, unreadable or malformed file, or one that changed under the reader.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.fspath(path):
            raise InputError("the name of the checkpoint is empty; name one .safetensors file")
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a folder; name one .safetensors file")
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.path}: is a pipe or a device; name one .safetensors file")
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path}: can't be opened: {error.strerror}") from None
        try:
            self.header, text = read_header(self._file, self.path)
        except OSError as error:
            self._file.close()
            raise InputError(f"{self.path}: can't be read: {error.strerror}") from None
        except BaseException:
            self._file.close()
            raise
        self.header_sha256 = hashlib.sha256(text).hexdigest()
        self.entries = {entry.name: entry for entry in self.header.entries}

    header: Header

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.header.data_start + self.header.data_size

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU."""
        entry = self.entries[name]
        if not entry.size:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        data = bytearray(entry.size)
        view = memoryview(data)
        for piece in self.chunks(entry):
            view[: len(piece)] = piece
            view = view[len(piece) :]
        return torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces of at most :data:`CHUNK`."""
        offset, end = self.header.data_start + entry.begin, self.header.data_start + entry.end
        while offset < end:
            try:
                self._file.seek(offset)
                piece = self._file.read(min(CHUNK, end - offset))
            except OSError as error:
                raise InputError(f"{self.path}: can't be read: {error.strerror}") from None
            if not piece:
                name = printable(entry.name)
                raise InputError(f"{self.path}: ended inside tensor {name}; it changed while being read")
            yield piece
            offset += len(piece)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
