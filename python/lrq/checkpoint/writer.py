"""An output, written in parts and in any order; its name appears when it is whole and synced, whatever happens."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import TracebackType

import torch

from lrq.checkpoint import disk
from lrq.checkpoint.checksum import combine, crc32
from lrq.checkpoint.header import Entry
from lrq.checkpoint.journal import Fingerprint, Journal, difference
from lrq.checkpoint.layout import Layout, OutputFile, partial_of
from lrq.checkpoint.reader import CODES
from lrq.checkpoint.resume import damaged, finished_in
from lrq.checkpoint.target import journal_of, other_form, unfinished_shards
from lrq.errors import InputError, UnfinishedError, printable

SYNC_BYTES = 1 << 28
"""Finished data is synced, and journaled, when it is this much,"""
SYNC_SECONDS = 15.0
"""or when this time has passed."""


class Writer:
    """The output of a run: every tensor has its place before it is computed; use it in a ``with`` statement.

    Data goes to ``<file>.partial``; ``<target>.partial.journal`` says which tensors are there. Leaving the block
    normally checks that every tensor was written, syncs and renames. Leaving it by bad input removes what was written;
    any other exception keeps it, and the next Writer with the same fingerprint goes on from there. An existing file of
    that name is replaced at the end, never before. :meth:`write_at` may be called from many threads.

    Raises:
        InputError: another run writes this output, an unfinished one doesn't fit, or the folder can't be written to.
        UnfinishedError: the disk failed, or is full.
    """

    def __init__(self, layout: Layout, fingerprint: Fingerprint, restart: bool = False) -> None:
        self.layout = layout
        self.partial = partial_of(layout.target)
        self._places: dict[str, tuple[int, Entry]] = {}
        for number, file in enumerate(layout.files):
            self._places |= {entry.name: (number, entry) for entry in file.header.entries}
        self._missing = {name for name, (_, entry) in self._places.items() if entry.size}
        self._total = len(self._missing)
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self._unsynced: list[dict[str, object]] = []
        self._unsynced_bytes, self._last_sync = 0, time.monotonic()
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._fds: list[int] = []
        self._owed = 0
        self._keep = self._sync_failed = False
        self._journal = Journal(journal_of(layout.target))
        try:
            self.finished = self._open(fingerprint, restart)
        except BaseException:
            try:
                self._close()
                if self._fresh:
                    self._remove()
                elif self._journal.empty:
                    self._journal.remove()
            finally:
                self._journal.close()
            raise
        self._missing -= self.finished

    finished: frozenset[str]
    """Tensors that an earlier run finished."""
    _fresh = False

    def _open(self, fingerprint: Fingerprint, restart: bool) -> frozenset[str]:
        records = [] if restart else self._journal.read()
        if not records:
            self._begin(fingerprint, restart)
            return frozenset()
        found = difference(records[0].get("fingerprint"), fingerprint)
        if found is not None:
            raise InputError(f"{self.partial}: an unfinished run is in the way: {found}; --restart begins again")
        checksums = finished_in(records[1:], self._places)
        whole = any(record.get("whole") for record in records[1:])
        for number, file in enumerate(self.layout.files):
            if not partial_of(file.path).exists() and whole and file.path.exists():
                # The crash came between two renames.
                os.replace(file.path, partial_of(file.path))
            if not partial_of(file.path).exists():
                lost = [name for name in checksums if self._places[name][0] == number]
                self._journal.append({"tensor": name, "crc": None} for name in lost)
                checksums = {name: checksum for name, checksum in checksums.items() if name not in lost}
        for number, file in enumerate(self.layout.files):
            self._fds.append(self._opened(file))
            if any(self._places[name][0] == number for name in checksums):
                self._check_header(number, file)
            else:
                self._prepare(number, file)
        bad = damaged(self._located(name, checksum) for name, checksum in checksums.items())
        if bad is not None:
            where = partial_of(self.layout.files[self._places[bad][0]].path)
            raise InputError(f"{where}: tensor {printable(bad)} is not what was written there; --restart begins again")
        return frozenset(checksums)

    def _begin(self, fingerprint: Fingerprint, restart: bool) -> None:
        self._clear_others(restart)
        for file in self.layout.files:
            partial = partial_of(file.path)
            if partial.exists() and not restart:
                raise InputError(f"{partial}: is there, but no journal says what it holds; remove it, or add --restart")
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
        self._fresh = True
        self._journal.begin(fingerprint)
        for number, file in enumerate(self.layout.files):
            self._fds.append(self._opened(file))
            self._prepare(number, file)
        self._guarded(disk.sync_folder, self.layout.target.parent)

    def _clear_others(self, restart: bool) -> None:
        """Runs of this output in another number of files, which did not end."""
        other = other_form(self.layout)
        if journal_of(other).exists():
            if not restart:
                raise InputError(
                    f"{partial_of(other)}: an unfinished run with another --shard_size is in the way; end it with that "
                    "one, or --restart begins again"
                )
            # Not that of a run that goes on: it holds the lock.
            Journal(journal_of(other)).remove()
            partial_of(other).unlink(missing_ok=True)
        for path in unfinished_shards(self.layout) if restart else ():
            path.unlink(missing_ok=True)

    def _opened(self, file: OutputFile) -> int:
        try:
            return disk.open_to_write(partial_of(file.path))
        except OSError as error:
            raise InputError(f"{file.path.parent}: can't write there: {error.strerror}") from None

    def _prepare(self, number: int, file: OutputFile) -> None:
        try:
            self._owed += disk.reserve(self._fds[number], file.size)
            if self._owed:
                disk.check_room(self._fds[number], self._owed)
        except OSError as error:
            raise UnfinishedError(f"{file.path}: can't reserve {file.size} bytes: {error.strerror}") from None
        self._guarded(os.ftruncate, self._fds[number], file.size)
        self._guarded(disk.write_at, self._fds[number], memoryview(file.header_bytes), 0)
        self._guarded(os.fsync, self._fds[number])

    def _check_header(self, number: int, file: OutputFile) -> None:
        there = bytearray(len(file.header_bytes))
        disk.read_at(self._fds[number], memoryview(there), 0)
        if there != file.header_bytes or os.fstat(self._fds[number]).st_size != file.size:
            raise InputError(f"{partial_of(file.path)}: is not what was written there; --restart begins again")

    def _located(self, name: str, checksum: int) -> tuple[str, int, int, int, int]:
        number, entry = self._places[name]
        start = self.layout.files[number].header.data_start + entry.begin
        return name, checksum, self._fds[number], start, entry.size

    def _guarded(self, call: object, *args: object) -> None:
        try:
            call(*args)  # type: ignore[operator]
        except OSError as error:
            raise UnfinishedError(f"{self.layout.target}: can't be written: {error.strerror}") from None

    def dtype_of(self, name: str) -> str:
        """The dtype in which a tensor is stored, as headers name it."""
        return self._places[name][1].dtype

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store a whole tensor; its dtype and shape must be those of the header."""
        _, entry = self._places[name]
        if (CODES[tensor.dtype], tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise RuntimeError(f"tensor {printable(name)}: planned {entry}, got {tensor.dtype} {list(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.write_at(name, 0, data.data)

    def write_at(self, name: str, begin: int, data: memoryview) -> None:
        """Store bytes of a tensor, ``begin`` counted from its start; every byte once."""
        number, entry = self._places[name]
        if not len(data):
            return
        start = self.layout.files[number].header.data_start + entry.begin + begin
        checksum = crc32(data)
        self._guarded(disk.write_at, self._fds[number], data, start)
        with self._lock:
            parts = self._parts.setdefault(name, [])
            parts.append((begin, len(data), checksum))
            whole = sum(length for _, length, _ in parts) == entry.size
            if whole:
                total = 0
                for _, length, one in sorted(self._parts.pop(name)):
                    total = combine(total, one, length)
                self._unsynced.append({"tensor": name, "crc": total})
                self._unsynced_bytes += entry.size
            late = self._unsynced_bytes >= SYNC_BYTES or time.monotonic() - self._last_sync > SYNC_SECONDS
        if whole and late and self._syncing.acquire(blocking=False):
            try:
                self._sync()
            finally:
                self._syncing.release()

    def _sync(self) -> None:
        """Data first, then the lines that vouch for it."""
        with self._lock:
            records, self._unsynced = self._unsynced, []
            self._unsynced_bytes, self._last_sync = 0, time.monotonic()
        if not records or self._sync_failed:
            return
        # A failed sync may have dropped any data that was not synced before: nothing later can be vouched for.
        self._sync_failed = True
        names = [str(record["tensor"]) for record in records]
        for number in sorted({self._places[name][0] for name in names}):
            self._guarded(disk.sync_data, self._fds[number])
        self._journal.append(records)
        self._sync_failed = False
        for name in names:
            _, _, fd, start, size = self._located(name, 0)
            disk.forget(fd, start, size)
        self._missing.difference_update(names)

    def kept(self) -> str:
        """What remains of an unfinished run, in words."""
        if not self._keep:
            return "nothing was written"
        done = self._total - len(self._missing)
        return f"{done} of {self._total} tensors are kept in {self.partial}; the same command goes on from there"

    def _finish(self) -> None:
        with self._syncing:
            self._sync()
        if self._missing:
            raise RuntimeError(f"never written: {', '.join(sorted(map(printable, self._missing)))}")
        for fd in self._fds:
            self._guarded(os.fsync, fd)
        self._close()
        if self.layout.index is not None:
            self._journal.append([{"whole": True}])
            with contextlib.suppress(FileNotFoundError):
                # It would name shards of the old output, which are replaced one by one.
                self.layout.target.unlink()
        for file in self.layout.files:
            self._guarded(os.replace, partial_of(file.path), file.path)
        if self.layout.index is not None:
            self._guarded(self._write_index, self.layout.index)
        self._guarded(disk.sync_folder, self.layout.target.parent)
        self._guarded(self._journal.remove)

    def _write_index(self, index: bytes) -> None:
        disk.sync_folder(self.layout.target.parent)
        fd = disk.open_to_write(self.partial, os.O_TRUNC)
        try:
            disk.write_at(fd, memoryview(index), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(self.partial, self.layout.target)

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def _remove(self) -> None:
        for path in {self.partial, *(partial_of(file.path) for file in self.layout.files)}:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self._journal.remove()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bad_input = isinstance(error, InputError) and not isinstance(error, UnfinishedError)
        try:
            if kind is None:
                self._finish()
            elif not bad_input:
                with contextlib.suppress(InputError), self._syncing:
                    self._sync()
        finally:
            # If the last steps failed, all is kept.
            self._keep = not bad_input and (kind is None or len(self._missing) < self._total)
            try:
                self._close()
                if kind is not None and not self._keep:
                    self._remove()
            finally:
                self._journal.close()
