"""Memory of this process: what it is, the most it was, and kept from growing by what happens only once."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch

from lrq.calibration.inputs import BINS, InputStats
from lrq.config import Rounding
from lrq.repair.bias import output_error
from lrq.rounding.solve import quantize_layer
from lrq.staging.naming import naming
from lrq.staging.tiles import Tile

_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's mallopt: larger blocks go back to the system when they are freed."""
_LARGE, _MEDIUM = 1 << 20, 1 << 18
"""The threshold of runs that learn, whose many blocks of a small matrix would cost a third of their time, and of
others, where what stays behind in the heap of every thread is what a peak differs by from run to run."""
_FEW_ROWS = 128


def warm_up(tiles: Iterable[Tile], rounding: Rounding, device: torch.device) -> None:
    """Do once, and small, what the run does: libraries, kernels and a GPU's context then count as there before."""
    wide_first = sorted(tiles, key=_columns, reverse=True)
    return_large_blocks(any(not tile.layer.rounding(rounding).simple for tile in wide_first))
    narrowest = {(tile.layer.format, len(tile.shape), tile.layer.rounding(rounding)): tile for tile in wide_first}
    for (fmt, _, own), tile in narrowest.items():
        rows = min(tile.shape[-2], max(_FEW_ROWS, fmt.tile_rows))
        # A GPU whose memory others take may have too little even for that.
        with naming(tile):
            few = torch.zeros(*[1] * (len(tile.shape) - 2), rows, _columns(tile), device=device)
            if fmt.refusal(tuple(few.shape)) is None:
                # Of gptq there is nothing to load: it is products and a factorization.
                quantize_layer(fmt, few, replace(own, optimizer=None) if own.optimizer == "gptq" else own, 0)
    measured = [tile for tile in wide_first if tile.layer.statistics_size]
    if measured:
        with naming(measured[-1]):
            few = torch.zeros(_FEW_ROWS, _columns(measured[-1]), device=device)
            output_error(few, few, few, _no_inputs(_columns(measured[-1])))


def _no_inputs(columns: int) -> InputStats:
    nothing = torch.zeros(columns, dtype=torch.float64)
    return InputStats(0, nothing, nothing, 0.0, torch.zeros(BINS, dtype=torch.int64))


def _columns(tile: Tile) -> int:
    return tile.shape[-1]


def return_large_blocks(learned: bool = False) -> None:
    """Let the C library give memory back that is free; from smaller blocks on where nothing is ``learned``."""
    # By itself glibc raises the threshold to the largest block freed, and keeps what is smaller in its heaps.
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_THRESHOLD, _LARGE if learned else _MEDIUM)


def give_back_workspaces(device: torch.device) -> None:
    """What cuBLAS keeps for every stream that it ran on, 32 MB each on Hopper, and what torch keeps free."""
    if device.type != "cuda":
        return
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        torch.cuda.synchronize(device)
        clear()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """The most bytes of this process in memory so far; 0 where the system does not say."""
    measured = _status("VmHWM")
    if measured:
        return measured
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(key: str) -> int:
    # Not getrusage: there, a child begins with the peak of its parent.
    try:
        with open("/proc/self/status") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(key)), 0)
    except OSError:
        return 0
