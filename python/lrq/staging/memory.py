"""Memory of a run: known before it starts, bounded while it runs, measured at its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lrq.config import Rounding
from lrq.errors import InputError, printable
from lrq.execution import Execution
from lrq.plan import Layer
from lrq.staging.process import peak, resident, warm_up
from lrq.staging.tiles import Tile, cut, smallest, whole

PIECE = 1 << 23
"""Bytes that are read, copied to or from a GPU, or written at a time."""
CPU_TILE = 1 << 25
"""Bytes of a tile on the CPU, where a format's rows are independent: what is in the caches is quick to write."""
GPU_FLIGHTS, CPU_FLIGHTS = 3, 2
"""Layers that are read, computed and written at a time."""
SPARE = 0.9
"""Share of the free memory of a GPU that ``--max_vram auto`` takes."""
_MOST_THREADS = 8
SLACK = 1 << 23
"""Bytes for what threads, the journal and the C library take while a run goes on."""


@dataclass(frozen=True)
class MemoryPlan:
    """How layers are cut, and what is in memory at a time."""

    tiles: dict[str, tuple[Tile, ...]]
    """By layer."""
    held: int
    """Bytes of layers between reading and writing; one layer may exceed it, alone."""
    work: int
    """Bytes more of the layer that is computed."""
    threads: int
    """Threads that read, and as many that write; 0: one thing after the other."""
    host: int
    """Predicted peak of the process's memory."""
    vram: int
    """Predicted peak of the GPU's memory; 0 on the CPU."""
    vram_limit: int | None = None


def plan_memory(layers: Sequence[Layer], rounding: Rounding, device: torch.device, execution: Execution) -> MemoryPlan:
    """Cut layers so that they fit.

    Raises:
        InputError: a layer can't fit; it is named, with its need.
    """
    on_gpu = device.type == "cuda"
    threads = 0 if execution.low_memory else min(_MOST_THREADS, max(2, os.cpu_count() or 1))
    buffers = PIECE * max(1, 2 * threads) if on_gpu else PIECE * max(1, threads)
    warm_up([whole(layer) for layer in layers], rounding, device)
    base = resident() + SLACK
    room = _room(execution.ram_bytes, "--max_ram", base + buffers)
    vram = _vram_limit(device, execution)
    limit, flag = (vram, "--max_vram") if on_gpu else (room, "--max_ram")
    tiles = {layer.name: _tiles(layer, rounding, limit, flag, on_gpu) for layer in layers}
    flat = [tile for some in tiles.values() for tile in some]
    largest = max((tile.held() for tile in flat), default=0)
    work = max((tile.work(rounding) for tile in flat), default=0)
    flights = 1 if execution.low_memory else GPU_FLIGHTS if on_gpu else CPU_FLIGHTS
    held = flights * largest
    if limit is not None:
        held = min(held, max(limit - work, 0))
    device_bytes = max(held, largest) + work
    host = base + buffers + (0 if on_gpu else device_bytes)
    return MemoryPlan(tiles, held, work, threads, max(host, peak()), device_bytes if on_gpu else 0, vram)


def _tiles(layer: Layer, rounding: Rounding, limit: int | None, flag: str, on_gpu: bool) -> tuple[Tile, ...]:
    one = whole(layer)
    need = one.held() + one.work(rounding)
    least = smallest(layer, rounding)
    independent = layer.format.matrix_scale is None or len(layer.source.shape) == 3
    wanted = need if on_gpu or not independent else CPU_TILE
    if limit is not None:
        least_need = least.held() + least.work(rounding)
        if least_need > limit:
            how = "" if least.is_whole else ", even in tiles"
            remedy = "" if rounding.simple else ", or add --simple, which needs less"
            raise InputError(
                f"layer {printable(layer.name)} {list(layer.source.shape)}: needs {_sized(least_need)}{how}, {flag} "
                f"leaves {_sized(limit)}; raise it{remedy}"
            )
        wanted = min(wanted, limit // 2 if independent else limit)
    return (one,) if need <= wanted else tuple(cut(layer, rounding, wanted))


def _sized(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _room(limit: int | None, flag: str, base: int) -> int | None:
    if limit is not None and limit <= base:
        raise InputError(f"{flag}: must be over {_sized(base)}, which the process takes without any layer")
    return None if limit is None else limit - base


def _vram_limit(device: torch.device, execution: Execution) -> int | None:
    if execution.max_vram is None or device.type != "cuda":
        return None
    if execution.vram_bytes is not None:
        return execution.vram_bytes
    return int(SPARE * torch.cuda.mem_get_info(device)[0])


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
