"""Timing on a GPU or the CPU, and what the machine is: shared by the benchmarks."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

COPY_BYTES = 1 << 30


def median_seconds(run: Callable[[int], object], device: torch.device, repeats: int) -> float:
    """Median time of ``run(i)``; i counts the calls, so that inputs can be rotated beyond the caches."""
    for i in range(3):
        run(i)
    times = []
    if device.type == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize(device)
        for i, (start, end) in enumerate(events):
            start.record()
            run(i)
            end.record()
        torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) / 1e3 for start, end in events]
    else:
        for i in range(repeats):
            started = time.perf_counter()
            run(i)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written a second, copying 1 GiB."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    repeats = 30 if device.type == "cuda" else 5
    return 2 * COPY_BYTES / median_seconds(lambda _: target.copy_(source), device, repeats)


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
    found["commit"] = commit.stdout.strip()
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
