"""A disk that loses power: a crash in the middle of any call, after which only what was synced is sure to be there."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any


class PowerLossError(BaseException):
    """The machine is off; nothing catches it."""


class Disk:
    """Stands in for the calls of ``os`` that change files; after ``calls`` of them the power fails.

    What was not synced is then lost in part, by lot: every write of its own, names made, changed or removed too.
    """

    WATCHED = ("pwrite", "fsync", "fdatasync", "replace", "unlink", "open", "ftruncate", "posix_fallocate")

    def __init__(self, monkeypatch: Any, seed: int, calls: int) -> None:
        self.lot, self.left, self.off = random.Random(seed), calls, False
        self.undo: dict[str, list[Any]] = {}
        """By path, how to take back what was not synced, newest last."""
        self.real = {name: getattr(os, name) for name in self.WATCHED}
        for name in self.WATCHED:
            monkeypatch.setattr(os, name, self._watch(name))
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: os.unlink(path))

    def _watch(self, name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            if self.off:
                raise PowerLossError
            writes = name != "open" or args[1] & os.O_CREAT
            self.left -= bool(writes)
            if self.left < 0:
                self.off = True
                if name == "pwrite" and self.lot.random() < 0.5:
                    data = bytes(args[1])
                    self._pwrite(args[0], data[: self.lot.randrange(len(data) + 1)], args[2])
                raise PowerLossError
            return getattr(self, f"_{name}", self.real[name])(*args, **keywords)

        return call

    def _note(self, path: str, undo: Any) -> None:
        self.undo.setdefault(path, []).append(undo)

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        path, before = os.readlink(f"/proc/self/fd/{fd}"), os.pread(fd, len(data), offset)
        size = os.fstat(fd).st_size

        def undo() -> None:
            if os.path.exists(path):
                with open(path, "r+b") as file:
                    file.seek(offset)
                    file.write(before)
                    if size < offset + len(data):
                        file.truncate(size)

        self._note(path, undo)
        return self.real["pwrite"](fd, data, offset)

    def _fsync(self, fd: int) -> None:
        self.undo.pop(os.readlink(f"/proc/self/fd/{fd}"), None)

    _fdatasync = _fsync

    def _open(self, path: Any, flags: int, *args: Any, **keywords: Any) -> int:
        path = os.fspath(path)
        if flags & os.O_CREAT and not os.path.exists(path):
            self._note(os.path.dirname(path), lambda: os.path.exists(path) and self.real["unlink"](path))
        return self.real["open"](path, flags, *args, **keywords)

    def _replace(self, source: Any, target: Any) -> None:
        source, target = os.fspath(source), os.fspath(target)
        old = Path(target).read_bytes() if os.path.exists(target) else None

        def undo() -> None:
            self.real["replace"](target, source)
            if old is not None:
                Path(target).write_bytes(old)

        self._note(os.path.dirname(target), undo)
        self.real["replace"](source, target)

    def _unlink(self, path: Any, *args: Any, **keywords: Any) -> None:
        path = os.fspath(path)
        old = Path(path).read_bytes() if os.path.exists(path) else None
        if old is not None:
            self._note(os.path.dirname(path), lambda: Path(path).write_bytes(old))
        self.real["unlink"](path, *args, **keywords)

    def lose(self) -> None:
        """The power is back: take back by lot what was not synced. Call it with the stand-ins gone."""
        for path, undos in self.undo.items():
            kept = self.lot.randrange(len(undos) + 1) if os.path.isdir(path) else None
            for number, undo in reversed(list(enumerate(undos))):
                # A folder's changes last in their order, a file's pages in any.
                if number >= kept if kept is not None else self.lot.random() < 0.5:
                    undo()
