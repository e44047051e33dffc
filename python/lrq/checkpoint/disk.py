"""The calls by which files are read and written: at a place, and synced."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Answers of file systems that can't reserve space."""
RESERVE_SECONDS = 0.1
"""What reserving space may take."""
RESERVE_PIECE = 1 << 26
"""Bytes that are reserved first; each time it is twice as much."""
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""What bears the name of an unfinished file but is a link must not lead the writer to another file."""
_seeking = threading.Lock()
"""Where a system can't read or write at a place, seeking and doing so must not be parted."""


def open_to_write(path: Path, *flags: int) -> int:
    """A descriptor to read and write ``path``, which is made if it is not there."""
    mode = os.O_RDWR | os.O_CREAT | _BINARY | _NO_LINK
    for flag in flags:
        mode |= flag
    return os.open(path, mode, 0o666)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``."""
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(fd, data, offset)
        else:
            with _seeking:
                os.lseek(fd, offset, os.SEEK_SET)
                count = os.write(fd, data)
        data, offset = data[count:], offset + count


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view``; the number of bytes read is smaller only at the end of the file."""
    filled = 0
    while filled < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(fd, [view[filled:]], offset + filled)
        else:
            with _seeking:
                os.lseek(fd, offset + filled, os.SEEK_SET)
                data = os.read(fd, len(view) - filled)
            count = len(data)
            view[filled : filled + count] = data
        if not count:
            break
        filled += count
    return filled


def reserve(fd: int, size: int) -> int:
    """Take the disk space now, where the system can: a disk too small is known before any work is done.

    A file system that takes its time over it, as one in memory does, is left alone: writing, beside which other work
    goes on, takes the rest. Returns the bytes of it, for :func:`check_room`.

    Raises:
        OSError: there is not enough.
    """
    owed = 0
    try:
        if hasattr(os, "posix_fallocate"):
            owed = _allocate(fd, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
    os.ftruncate(fd, size)
    return owed


def check_room(fd: int, size: int) -> None:
    """Raise :class:`OSError` unless the file system has so many bytes free, or doesn't know."""
    room = os.fstatvfs(fd)
    free = room.f_bavail if os.geteuid() else room.f_bfree
    if room.f_blocks and free * room.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _allocate(fd: int, size: int) -> int:
    started, done, piece = time.monotonic(), 0, RESERVE_PIECE
    while done < size:
        count = min(piece, size - done)
        os.posix_fallocate(fd, done, count)
        done, piece = done + count, 2 * piece
        if time.monotonic() - started > RESERVE_SECONDS:
            return max(size - max(done, 512 * os.fstat(fd).st_blocks), 0)
    return 0


def sync_data(fd: int) -> None:
    """What was written lasts; of the file's attributes only those that are needed to read it."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """Names made, changed and removed last; Windows has no such call."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget(fd: int, offset: int, size: int) -> None:
    """The page cache needs this part no more: whole pages within it are dropped, if they are on the disk."""
    if hasattr(os, "posix_fadvise"):
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)


def lock(fd: int) -> bool:
    """Take the lock of an open file, which ends with the process; False if another holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far beyond the end: locked bytes can't be read by others.
            os.lseek(fd, 1 << 30, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without locks: better unguarded than not at all.
    return True


def same_file(fd: int, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        there: Any = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
