"""Threads that read ahead and write behind, while the caller computes: order kept, memory bounded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lrq.checkpoint.header import Entry
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.writer import Writer
from lrq.errors import InputError, printable
from lrq.formats import bfloat16
from lrq.staging.memory import PIECE, Budget, MemoryPlan, StoppedError
from lrq.staging.naming import naming
from lrq.staging.places import Place
from lrq.staging.tiles import Tile

_SMALL = 1 << 14
"""Bytes that a load takes of the budget at least: of small layers, too, only so many are on their way."""
_LEAST_BUDGET = 1 << 20
_MOST_BEGUN = 1 << 10
"""Writes that are remembered before those that ended are forgotten."""

_LEAVE = "leave it in the source's dtype"

Step = Entry | tuple[Tile, str]
"""A tensor that is copied, or a tile and what it is read for."""


@dataclass
class Load:
    """A tile on its way: its bytes, and when they are there."""

    tile: Tile
    purpose: str
    memory: Tensor
    parts: list[Future[None]] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)
    """Bytes of what was computed, until they are written."""
    unwritten: int = 0


class Conveyor:
    """Moves what a run reads and writes; use it in a ``with`` statement, which waits for all that was begun.

    An exception in a thread is raised by the next call.
    """

    def __init__(self, source: Reader, writer: Writer, place: Place, memory: MemoryPlan) -> None:
        self._source, self._writer, self._place = source, writer, place
        self._budget = Budget(max(memory.held, _LEAST_BUDGET))
        self._threaded = memory.threads > 0
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._begun: list[Future[None]] = []
        self._loader: threading.Thread | None = None
        if self._threaded:
            self._readers = ThreadPoolExecutor(memory.threads, "read")
            self._writers = ThreadPoolExecutor(memory.threads, "write")

    def loads(self, steps: Iterable[Step]) -> Iterator[Load]:
        """Tiles in their order, each when its bytes are in the place where it is computed; copies happen on the way."""
        for load in self._ahead(steps) if self._threaded else self._begin(steps):
            for part in load.parts:
                part.result()
            self.check()
            yield load

    def _ahead(self, steps: Iterable[Step]) -> Iterator[Load]:
        ready: queue.SimpleQueue[Load | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                for load in self._begin(steps):
                    ready.put(load)
            except StoppedError:
                pass
            except BaseException as error:
                self._fail(error)
            ready.put(None)

        self._loader = threading.Thread(target=work, name="load", daemon=True)
        self._loader.start()
        while (load := ready.get()) is not None:
            yield load
        self.check()

    def _begin(self, steps: Iterable[Step]) -> Iterator[Load]:
        for step in steps:
            if isinstance(step, Entry):
                self._copy(step)
            else:
                yield self._load(*step)

    def _load(self, tile: Tile, purpose: str) -> Load:
        self._budget.take(max(tile.held(), _SMALL))
        first, size = tile.source_range
        with naming(tile):
            load = Load(tile, purpose, self._place.take(size))
        for begin in range(0, size, PIECE):
            part = load.memory[begin : begin + min(PIECE, size - begin)]
            # What is read once more is not forgotten.
            fill = self._fill(tile.layer.source, first + begin, purpose == "quantize")
            load.parts += self._submit("_readers", self._place.load, part, fill)
        return load

    def _fill(self, entry: Entry, begin: int, forget: bool) -> Callable[[memoryview], None]:
        def fill(view: memoryview) -> None:
            self._source.read_into(entry, begin, view)
            if forget:
                self._source.forget(entry, begin, len(view))

        return fill

    def _copy(self, entry: Entry) -> None:
        halved = self._writer.dtype_of(entry.name) != entry.dtype
        for begin in range(0, entry.size, PIECE):
            size = min(PIECE, entry.size - begin)
            drain = self._halve(entry, begin) if halved else self._drain(entry.name, begin)
            self._remember(self._submit("_writers", self._place.through, size, self._fill(entry, begin, True), drain))

    def _halve(self, entry: Entry, begin: int) -> Callable[[memoryview], None]:
        """What writes a piece in bfloat16, ``begin`` counted in the source."""
        dtype = bfloat16.WIDER[entry.dtype]

        def drain(view: memoryview) -> None:
            try:
                half = bfloat16.round_in_place(torch.frombuffer(view, dtype=torch.uint8), dtype)
            except ValueError as error:
                raise InputError(f"{self._source.path}: {printable(entry.name)} {error}; {_LEAVE}") from None
            self._writer.write_at(entry.name, begin * 2 // dtype.itemsize, half.numpy().data)

        return drain

    def _drain(self, name: str, begin: int) -> Callable[[memoryview], None]:
        return lambda view: self._writer.write_at(name, begin, view)

    def write(self, load: Load, tensors: dict[str, tuple[int, Tensor]]) -> list[Future[None]]:
        """Write tensors by name, from a byte of them on; the load's memory is free again when all is written."""
        mark = self._place.mark()
        parts = []
        for name, (first, tensor) in tensors.items():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            load.stored.append(data)
            for begin in range(0, data.numel(), PIECE):
                parts.append((len(load.stored) - 1, begin, self._drain(name, first + begin)))
        load.unwritten = len(parts)
        if not parts:
            self.release(load)
        found: list[Future[None]] = []
        for number, begin, drain in parts:
            found += self._submit("_writers", self._write_part, load, number, begin, mark, drain)
        self._remember(found)
        return found

    def _remember(self, writes: list[Future[None]]) -> None:
        with self._lock:
            self._begun += writes
            if len(self._begun) > 2 * _MOST_BEGUN:
                # What a thread raised is known: they return nothing.
                self._begun = [write for write in self._begun if not write.done()]

    def _write_part(
        self, load: Load, number: int, begin: int, mark: torch.cuda.Event | None, drain: Callable[[memoryview], None]
    ) -> None:
        part = load.stored[number][begin : begin + PIECE]
        if part.device.type == "cpu":
            drain(part.numpy().data)
        else:
            self._place.store(part, mark, drain)
        with self._lock:
            load.unwritten -= 1
            last = not load.unwritten
        if last:
            # Nothing may hold what was computed when its memory counts as free.
            del part
            self.release(load)

    def release(self, load: Load) -> None:
        """The tile's memory is needed no more."""
        load.stored = []
        self._place.give(load.memory)
        load.memory = torch.empty(0)
        self._budget.give(max(load.tile.held(), _SMALL))

    def _submit(self, pool: str, call: Callable[..., None], *args: Any) -> list[Future[None]]:
        if not self._threaded:
            call(*args)
            return []
        return [getattr(self, pool).submit(self._guarded, call, *args)]

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        if self._failure is not None:
            return
        try:
            call(*args)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._budget.stop()

    def check(self) -> None:
        """Raise what a thread raised."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until all is written."""
        for part in self._begun:
            part.result()
            self.check()
        self._begun = []

    def __enter__(self) -> Conveyor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.stop()
        if self._loader is not None:
            self._loader.join()
        if self._threaded:
            self._readers.shutdown(cancel_futures=kind is not None)
            self._writers.shutdown(cancel_futures=kind is not None)
        self._place.close()
