"""One safetensors file, written header first under a temporary name; it takes its name when it is whole and synced."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from lrq.checkpoint.header import Entry, Header
from lrq.checkpoint.reader import CODES
from lrq.errors import InputError, printable

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Answers of file systems that can't reserve space."""


class Writer:
    """The output of a run: every tensor has its place before it is computed; use it in a ``with`` statement.

    Leaving the block normally checks that every tensor was written, syncs and renames; leaving it by an exception
    removes what was written. An existing file of that name is replaced at the end, never before.

    Raises:
        InputError: the folder is missing or can't be written to, or the disk is full.
    """

    def __init__(self, path: Path, header: Header, header_bytes: bytes) -> None:
        self.path, self.header = path, header
        # Of the name only a part: it may be as long as a file system takes.
        self._partial = path.with_name(f".{path.name[:32]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        self._missing = {entry.name for entry in header.entries if entry.size}
        self._places = {entry.name: entry for entry in header.entries}
        try:
            self._file = self._partial.open("xb", buffering=0)
        except OSError as error:
            raise InputError(f"{path.parent}: can't write there: {error.strerror}") from None
        try:
            self._reserve(header.data_start + header.data_size)
            self._write(header_bytes, 0)
        except BaseException:
            self._discard()
            raise

    def _reserve(self, size: int) -> None:
        """Take the disk space now, where the system can: a disk too small is known before any work is done."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise InputError(f"{self.path}: can't reserve {size} bytes: {error.strerror}") from None

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise InputError(f"{self.path}: can't be written: {error.strerror}") from None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor in its place; its dtype and shape must be those of the header."""
        entry = self._places[name]
        if (CODES[tensor.dtype], tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise RuntimeError(f"tensor {printable(name)}: planned {entry}, got {tensor.dtype} {list(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.copy(entry, [data.data])

    def copy(self, entry: Entry, chunks: Iterable[bytes | memoryview]) -> None:
        """Store raw bytes in the place of ``entry`` of the header."""
        offset = self.header.data_start + entry.begin
        for chunk in chunks:
            self._write(chunk, offset)
            offset += len(chunk)
        self._missing.discard(entry.name)

    def _discard(self) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._partial.unlink()

    def _finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"never written: {', '.join(sorted(map(printable, self._missing)))}")
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise InputError(f"{self.path}: can't be written: {error.strerror}") from None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()


def _sync_folder(folder: Path) -> None:
    """A rename is durable when the folder is synced; Windows has no such call."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
