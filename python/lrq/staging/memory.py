"""Memory of a run: known before it starts, bounded while it runs, measured at its end."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lrq.config import Rounding
from lrq.errors import InputError, printable
from lrq.execution import Execution
from lrq.selection.layer import Layer
from lrq.staging.process import peak, resident, warm_up
from lrq.staging.tiles import Tile, cut, smallest, whole
from lrq_kernels import dispatch

PIECE = 1 << 23
"""Bytes that are read, copied to or from a GPU, or written at a time."""
CPU_TILE = 1 << 25
"""Bytes of a tile on the CPU, where a format's rows are independent: what is in the caches is quick to write."""
GPU_FLIGHTS, CPU_FLIGHTS = 3, 2
"""Layers that are read, computed and written at a time."""
SPARE = 0.9
"""Share of the free memory of a GPU that ``--max_vram auto`` takes."""
GPU_WORKERS = 3
"""Layers that are learned at a time on a GPU, or as many as it has memory for."""
_MOST_THREADS = 8
VRAM_SLACK = 1 << 26
"""Bytes by which torch's allocator rounds up, and libraries' workspaces."""
LIBRARIES = 5 << 25
"""Bytes of host memory that CUDA's libraries take beyond the warm-up, as measured: each loads what a shape needs."""
LEARNING_LIBRARIES = 5 << 23
"""The same of LAPACK and its threads, on the CPU."""
SPREAD = 1 << 23
"""Bytes by which the same process differs from run to run."""
SLACK = 3 << 22
"""Bytes for what threads, the journal and the C library take while a run goes on, and for code that is read from disk
only then: how much of it the system maps at a time hangs on what it has in its caches."""
RESULT = 1 << 10
"""Bytes that are remembered of every layer."""


@dataclass(frozen=True)
class MemoryPlan:
    """How layers are cut, and what is in memory at a time."""

    tiles: dict[str, tuple[Tile, ...]]
    """By layer."""
    held: int
    """Bytes of layers between reading and writing; one layer may exceed it, alone."""
    work: int
    """Bytes more of the layers that are computed."""
    workers: int
    """Layers that are computed at a time."""
    threads: int
    """Threads that read, and as many that write; 0: one thing after the other."""
    host: int
    """Predicted peak of the process's memory."""
    vram: int
    """Predicted peak of the GPU's memory; 0 on the CPU."""
    vram_limit: int | None = None
    plain: bool = False
    """Whether there are no kernels, and PyTorch does everything."""


def plan_memory(
    layers: Sequence[Layer],
    rounding: Rounding,
    device: torch.device,
    execution: Execution,
    count: int | None = None,
) -> MemoryPlan:
    """Cut layers so that they fit; ``count`` is that of all layers where ``layers`` are one of each kind.

    Raises:
        InputError: a layer can't fit; it is named, with its need.
    """
    on_gpu = device.type == "cuda"
    threads = 0 if execution.low_memory else min(_MOST_THREADS, max(2, os.cpu_count() or 1))
    buffers = PIECE * max(1, 2 * threads) if on_gpu else PIECE * max(1, threads)
    plain = has_no_kernels(device)
    warm_up([whole(layer) for layer in layers], rounding, device)
    learned = any(not layer.rounding(rounding).simple for layer in layers)
    libraries = LIBRARIES if on_gpu else LEARNING_LIBRARIES if learned else 0
    base = resident() + SLACK + buffers + libraries + RESULT * (len(layers) if count is None else count)
    if execution.ram_bytes is not None and base > execution.ram_bytes and on_gpu:
        raise InputError(f"--max_ram: the process takes {megabytes(base)} without any layer; raise it to that")
    room = _room(device, execution, 0 if on_gpu else base)
    if room is not None:
        _check_fits(layers, rounding, room, plain)
    limit = None if room is None else room.left
    tiles = {layer.name: _tiles(layer, rounding, limit, on_gpu, plain) for layer in layers}
    flat = [tile for some in tiles.values() for tile in some]
    largest = max((tile.held() for tile in flat), default=0)
    work = max((tile.work(rounding) for tile in flat), default=0)
    flights = 1 if execution.low_memory else GPU_FLIGHTS if on_gpu else CPU_FLIGHTS
    side_by_side = on_gpu and learned and not execution.low_memory
    workers = _workers(device, flights * largest, largest + work, limit) if side_by_side else 1
    work *= workers
    held = (flights + workers - 1) * largest
    if limit is not None:
        held = min(held, max(limit - work, 0))
    device_bytes = max(held, largest) + work
    host = max(base + (0 if on_gpu else device_bytes), peak())
    if not on_gpu:
        return MemoryPlan(tiles, held, work, workers, threads, host, 0, plain=plain)
    vram = device_bytes + workers * VRAM_SLACK
    return MemoryPlan(tiles, held, work, workers, threads, host, vram, room.limit if room else None, plain)


def has_no_kernels(device: torch.device) -> bool:
    """Whether PyTorch alone computes there."""
    # Of no weights: a GPU may have no memory left to ask with.
    return dispatch.choose("amax", (torch.empty(0, 16, device=device),)) == "reference"


def _workers(device: torch.device, alone: int, each: int, limit: int | None) -> int:
    """Layers that a GPU learns at a time, of which each takes so many bytes beside those of a run of one."""
    free = int(SPARE * torch.cuda.mem_get_info(device)[0]) if limit is None else limit
    return next((n for n in range(GPU_WORKERS, 1, -1) if alone + n * (each + VRAM_SLACK) <= free), 1)


@dataclass(frozen=True)
class _Room:
    """A bound that the user set, and what of it is left for layers."""

    flag: str
    limit: int
    left: int


def _room(device: torch.device, execution: Execution, base: int) -> _Room | None:
    """Of the memory where layers are computed; None without a bound."""
    if device.type == "cuda":
        limit = execution.vram_bytes
        if execution.max_vram == "auto":
            torch.cuda.empty_cache()
            limit = int(SPARE * torch.cuda.mem_get_info(device)[0])
        return None if limit is None else _Room("--max_vram", limit, limit - VRAM_SLACK)
    limit = execution.ram_bytes
    return None if limit is None else _Room("--max_ram", limit, limit - base)


def _check_fits(layers: Sequence[Layer], rounding: Rounding, room: _Room, plain: bool) -> None:
    each = (smallest(layer, rounding, plain) for layer in layers)
    least = max(each, key=lambda tile: tile.need(rounding), default=None)
    if least is None or least.need(rounding) <= room.left:
        return
    need, layer = least.need(rounding), least.layer
    raise InputError(
        f"layer {printable(layer.name)} {list(layer.source.shape)}: needs {megabytes(need)}"
        f"{'' if least.is_whole else ', even in tiles'}, {room.flag} leaves {megabytes(max(room.left, 0))}; "
        f"raise it to {megabytes(room.limit - room.left + need + SPREAD)}"
        f"{'' if rounding.simple else ', or add --simple, which needs less'}"
    )


def _tiles(layer: Layer, rounding: Rounding, limit: int | None, on_gpu: bool, plain: bool) -> tuple[Tile, ...]:
    one = whole(layer, plain)
    independent = layer.format.matrix_scale is None or len(layer.source.shape) == 3
    wanted = one.need(rounding) if on_gpu or not independent else CPU_TILE
    if limit is not None:
        wanted = min(wanted, limit // 2 if independent else limit)
    return (one,) if one.need(rounding) <= wanted else tuple(cut(layer, rounding, wanted, plain))


def megabytes(count: int) -> str:
    """``45.2 MB``, rounded up: what is advised is enough."""
    return f"{math.ceil(count / 1e5) / 10:.1f} MB"


class StoppedError(Exception):
    """The run ends; whoever waits for memory need not any more."""


class Budget:
    """Bytes that may be in use at a time; whoever wants more waits. A wish larger than all of it waits to be alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._stopped = limit, 0, False
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes are free.

        Raises:
            StoppedError: :meth:`stop` was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._used or self._used + size <= self._limit)
            if self._stopped:
                raise StoppedError
            self._used += size

    def give(self, size: int) -> None:
        """Give them back."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
