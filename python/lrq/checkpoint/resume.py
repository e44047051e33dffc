"""What an earlier run left: which tensors its journal vouches for, and whether they are still there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lrq.checkpoint import disk

PIECE = 1 << 22
"""Bytes in memory of each thread that checks."""


def finished_in(records: Iterable[dict[str, Any]], known: Container[str]) -> dict[str, int]:
    """Checksum by tensor; a later line without one takes an earlier one back."""
    finished: dict[str, int] = {}
    for record in records:
        name, checksum = record.get("tensor"), record.get("crc")
        if isinstance(name, str) and name in known and isinstance(checksum, int):
            finished[name] = checksum
        elif isinstance(name, str):
            finished.pop(name, None)
    return finished


def damaged(tensors: Iterable[tuple[str, int, int, int, int]]) -> str | None:
    """The first of (name, checksum, descriptor, offset, size) whose bytes have another checksum."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next((name for name in pool.map(_check, tensors) if name is not None), None)


def _check(tensor: tuple[str, int, int, int, int]) -> str | None:
    name, expected, fd, offset, size = tensor
    buffer = bytearray(min(PIECE, size))
    checksum = 0
    for begin in range(0, size, PIECE):
        view = memoryview(buffer)[: min(PIECE, size - begin)]
        if disk.read_at(fd, view, offset + begin) < len(view):
            return name
        checksum = zlib.crc32(view, checksum)
    disk.forget(fd, offset, size)
    return None if checksum == expected else name
