"""Timing on a GPU or the CPU, and what the machine is: shared by the benchmarks."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

COPY_BYTES = 1 << 30


def seconds_of(runs: list[Callable[[], object]], device: torch.device, repeats: int = 20) -> float:
    """Median time of one of ``runs``, which do the same work on different memory, beyond the caches together."""
    if device.type != "cuda":
        return statistics.median(_timed(run) for run in runs * (1 + 4 // len(runs)))
    for run in runs[:3]:
        run()
    torch.cuda.synchronize(device)
    try:
        replay = _captured(runs)
    except RuntimeError:  # what can't be captured is timed as it is launched
        replay = partial(_all, runs)
    return _replayed(replay, device, repeats) / len(runs)


def _replayed(replay: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(2):
        replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _timed(run: Callable[[], object]) -> float:
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _all(runs: list[Callable[[], object]]) -> list[object]:
    # The results are held together, so that no memory is written twice.
    return [run() for run in runs]


def _captured(runs: list[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _all(runs)

    def replay() -> object:
        graph.replay()
        return results

    return replay


def call_microseconds(run: Callable[[], object], device: torch.device, calls: int = 500) -> float:
    """Time of the host per call, the least of 9 runs of so many calls: others use the host too."""
    found = []
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        found.append((time.perf_counter() - started) / calls * 1e6)
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes read plus bytes written a second, copying ``size`` bytes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device.type != "cuda":
        return 2 * size / seconds_of([lambda: target.copy_(source)] * 5, device)
    # Not as a graph: its copies are those of the copy engine, a third slower.
    return 2 * size / _replayed(lambda: target.copy_(source), device, 30)


def machine(device: torch.device) -> dict[str, str]:
    """GPU or CPU, driver, versions and commit."""
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    else:
        found["threads"] = str(torch.get_num_threads())
    for package in ("torch", "triton", "lrq", "comfy-kitchen"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    # A copy of the tree on another machine may know no commit, or not its own.
    found["commit"] = os.environ.get("LRQ_COMMIT") or commit.stdout.strip()
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
