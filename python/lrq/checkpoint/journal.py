"""What of an output is finished, so that the next run goes on from there: lines that are only ever appended.

A line is a CRC-32 in hexadecimal, a space and JSON. The first is the fingerprint of the run; each further one names a
tensor whose data was synced before. A line that was torn by a crash, and what follows it, counts as never written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lrq.checkpoint import disk
from lrq.checkpoint.checksum import crc32
from lrq.errors import InputError, UnfinishedError, printable

MAX_SIZE = 1 << 30
"""No run writes a longer journal: a hundred bytes a tensor, and a header bounds the tensors."""

Fingerprint = dict[str, Any]
"""What decides the bytes of the output, by words for people."""


class Journal:
    """The open journal of one output, locked against a second run.

    Raises:
        InputError: another run holds it, or the folder can't be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            try:
                self._fd = disk.open_to_write(path)
            except OSError as error:
                raise InputError(f"{path.parent}: can't write there: {error.strerror}") from None
            try:
                if not disk.lock(self._fd):
                    raise InputError(f"{path}: another run is writing this output; wait for it, or name another")
                # The run that had the lock may have removed the file meanwhile.
                if disk.same_file(self._fd, path):
                    break
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)
        self._end = 0

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; the next is appended behind them."""
        size = min(os.fstat(self._fd).st_size, MAX_SIZE)
        data = bytearray(size)
        records = []
        for line in bytes(data[: disk.read_at(self._fd, memoryview(data), 0)]).splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            records.append(record)
            self._end += len(line)
        return records

    @property
    def empty(self) -> bool:
        """Whether it holds no line that can be read."""
        return self._end == 0

    def begin(self, fingerprint: Fingerprint) -> None:
        """Forget all, and start with the fingerprint of this run."""
        self._end = 0
        self._append([{"fingerprint": fingerprint}])
        self._guarded(disk.sync_folder, self.path.parent)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add lines, which last when this returns."""
        self._append(records)

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        data = b"".join(map(_line, records))
        self._guarded(os.ftruncate, self._fd, self._end)
        self._guarded(disk.write_at, self._fd, memoryview(data), self._end)
        self._guarded(os.fsync, self._fd)
        self._end += len(data)

    def _guarded(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except OSError as error:
            raise UnfinishedError(f"{self.path}: can't be written: {error.strerror}") from None

    def remove(self) -> None:
        """The output is whole, or given up."""
        if os.name == "nt":
            self.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Give the lock back; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % crc32(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def difference(before: Any, now: Fingerprint) -> str | None:
    """The first thing in which two fingerprints differ, in words."""
    if not isinstance(before, dict):
        return "its first line is no fingerprint"
    for key in (*now, *before):
        if before.get(key) != now.get(key):
            return f"{printable(key)} was {_short(before.get(key))}, is {_short(now.get(key))}"
    return None


def _short(value: Any) -> str:
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
