"""Where weights are computed, and how bytes get there and back: the CPU's memory, or a GPU's through pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from lrq.staging.memory import PIECE

Fill = Callable[[memoryview], None]
"""Reads bytes into memory of the host."""
Drain = Callable[[memoryview], None]
"""Writes bytes from memory of the host."""


class Buffers(threading.local):
    """One piece of host memory for every thread, made when it is first used."""

    def __init__(self, pinned: bool) -> None:
        # Called in every thread anew.
        self._pinned = pinned
        self._memory: Tensor | None = None
        self.event: torch.cuda.Event | None = None

    def memory(self, size: int) -> Tensor:
        """uint8 [size], at most :data:`PIECE`."""
        if self._memory is None:
            self._memory = torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._pinned)
        return self._memory[:size]


class Place:
    """Memory in which layers are computed: any device of torch, with copies that wait.

    All but :meth:`mark` is called from many threads.
    """

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self._device = device
        self._buffers = Buffers(pinned)

    def take(self, size: int) -> Tensor:
        """Memory for so many bytes, uint8."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def give(self, memory: Tensor) -> None:
        """Memory that is not needed any more, and that no computation still reads."""

    def load(self, part: Tensor, fill: Fill) -> None:
        """Fill memory of at most :data:`PIECE` bytes; it is there when this returns."""
        host = self._buffers.memory(part.numel())
        fill(host.numpy().data)
        part.copy_(host)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the computation that :meth:`store` waits for."""
        return None

    def store(self, part: Tensor, mark: torch.cuda.Event | None, drain: Drain) -> None:
        """Hand over bytes, at most :data:`PIECE`, of what was computed before the mark."""
        drain(part.cpu().numpy().data)

    def through(self, size: int, fill: Fill, drain: Drain) -> None:
        """Move bytes, at most :data:`PIECE`, that are not computed with."""
        view = self._buffers.memory(size).numpy().data
        fill(view)
        drain(view)

    def close(self) -> None:
        """Nothing moves any more."""


class Host(Place):
    """The CPU: what is read is computed where it lies, and written from there."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._free: list[Tensor] = []
        self._wanted = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        with self._lock:
            self._wanted = size
            for number, memory in enumerate(self._free):
                if memory.numel() == size:
                    return self._free.pop(number)
            # What fits nothing now would be memory beyond what was predicted.
            self._free = []
        return super().take(size)

    def give(self, memory: Tensor) -> None:
        with self._lock:
            # Of another size than what is wanted now it would stay beside that.
            if memory.numel() == self._wanted:
                self._free.append(memory)

    def load(self, part: Tensor, fill: Fill) -> None:
        fill(part.numpy().data)


class Cuda(Place):
    """A GPU: every thread has its own piece of pinned memory, so that reading, copying and writing overlap.

    The copies have streams of their own, up and down. A thread waits for its copy before it uses its memory again; what
    was uploaded is there before it is computed with, and what is downloaded was computed before its mark. So no memory
    is given back to the allocator while a stream still uses it.
    """

    def __init__(self, device: torch.device, limit: int | None) -> None:
        super().__init__(device, pinned=True)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._limited = limit is not None
        if limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)

    def take(self, size: int) -> Tensor:
        with torch.cuda.stream(self._up):
            return super().take(size)

    def load(self, part: Tensor, fill: Fill) -> None:
        with torch.cuda.stream(self._up):
            pinned = self._buffers.memory(part.numel())
            fill(pinned.numpy().data)
            part.copy_(pinned, non_blocking=True)
            self._wait(self._up)

    def mark(self) -> torch.cuda.Event | None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def store(self, part: Tensor, mark: torch.cuda.Event | None, drain: Drain) -> None:
        with torch.cuda.stream(self._down):
            pinned = self._buffers.memory(part.numel())
            if mark is not None:
                self._down.wait_event(mark)
            pinned.copy_(part, non_blocking=True)
            self._wait(self._down)
            drain(pinned.numpy().data)

    def close(self) -> None:
        if self._limited:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _wait(self, stream: torch.cuda.Stream) -> None:
        # Blocking: a spinning thread would take a core from the others.
        event = self._buffers.event = self._buffers.event or torch.cuda.Event(blocking=True)
        event.record(stream)
        event.synchronize()


def place_on(device: torch.device, vram_limit: int | None) -> Place:
    """The memory of a device."""
    if device.type == "cuda":
        return Cuda(device, vram_limit)
    return Host() if device.type == "cpu" else Place(device)
