"""Speed of the kernels: every backend and shape, µs, GB/s of ideal bytes and share of the copy bandwidth of this run.

    python benchmarks/bench_kernels.py [--device cuda] [--json benchmarks/results/kernels-h200.json]

Ideal bytes: the weight read once, codes and scales written once. Inputs rotate beyond the L2 cache. The bits of each
kernel are compared with the reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrq_kernels
from lrq_kernels.dispatch import BACKENDS, refusal
from measure import copy_bandwidth, machine, median_seconds

ROTATE_BYTES = 200e6
Run = Callable[[Tensor, Tensor], object]
Samples = list[tuple[Tensor, Tensor]]
CASES: dict[str, Run] = {
    "quantize_nvfp4, scale given": lambda x, scale: lrq_kernels.quantize_nvfp4(x, scale),
    "quantize_nvfp4": lambda x, scale: lrq_kernels.quantize_nvfp4(x),
    "quantize_nvfp4, best scales": lambda x, scale: lrq_kernels.quantize_nvfp4(x, scale, 4.0),
}
SHAPES = {"cuda": [(3072, 3072), (14336, 4096), (18432, 5120), (64, 1024, 1024)], "cpu": [(3072, 3072)]}


def peer(x: Tensor, scale: Tensor) -> object:
    """comfy-kitchen's best backend for the same work, or None where it is not installed."""
    import comfy_kitchen

    return comfy_kitchen.quantize_nvfp4(x, scale)


def inputs(shape: tuple[int, ...], device: torch.device) -> Samples:
    """Weights of bf16 with their tensor scales, enough to be more than the caches hold."""
    one = torch.Size(shape).numel() * 2
    found = []
    for seed in range(max(2, round(ROTATE_BYTES / one)) if device.type == "cuda" else 2):
        generator = torch.Generator(device).manual_seed(seed)
        x = (torch.randn(*shape, generator=generator, device=device) * 0.02).bfloat16()
        found.append((x, lrq_kernels.amax(x) / (448 * 6)))
    return found


def ideal_bytes(x: Tensor) -> int:
    outputs = lrq_kernels.quantize_nvfp4(x.to("meta"))
    return sum(t.numel() * t.element_size() for t in (x, *outputs))


def same_bits(run: Callable[[], Any], backend: str) -> bool:
    results = []
    for chosen in (backend, "reference"):
        with lrq_kernels.use_backend(chosen):
            results.append([t.contiguous().reshape(-1).view(torch.uint8) for t in run()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def bench(device: torch.device, repeats: int) -> list[dict[str, object]]:
    bandwidth = copy_bandwidth(device)
    print(f"{machine(device)}\ncopy bandwidth {bandwidth / 1e9:.0f} GB/s")
    rows: list[dict[str, object]] = [{"copy_gb_s": bandwidth / 1e9}]
    for shape in SHAPES[device.type]:
        samples = inputs(shape, device)
        for name, run in CASES.items():
            for backend in BACKENDS:
                if refusal("quantize_nvfp4", backend, (*samples[0], None)) is None:
                    rows.append(time_backend(name, run, backend, samples, bandwidth, repeats))
        rows += time_peer(samples, bandwidth, repeats)
    return rows


def time_backend(name: str, run: Run, backend: str, samples: Samples, bandwidth: float, repeats: int) -> dict:
    bits = same_bits(lambda: run(*samples[0]), backend)
    if backend == "reference":
        repeats = min(repeats, 3)
    with lrq_kernels.use_backend(backend):
        device = samples[0][0].device
        seconds = median_seconds(lambda i: run(*samples[i % len(samples)]), device, repeats)
    return row(name, samples[0][0], backend, seconds, bandwidth, bits)


def time_peer(samples: Samples, bandwidth: float, repeats: int) -> list[dict]:
    try:
        peer(*samples[0])
    except Exception as error:  # whatever a peer does, the benchmark goes on and says so
        print(f"comfy-kitchen: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return []
    seconds = median_seconds(lambda i: peer(*samples[i % len(samples)]), samples[0][0].device, repeats)
    return [row("quantize_nvfp4, scale given", samples[0][0], "comfy-kitchen", seconds, bandwidth, None)]


def row(name: str, x: Tensor, backend: str, seconds: float, bandwidth: float, bits: bool | None) -> dict:
    shape, size = tuple(x.shape), ideal_bytes(x)
    found = {
        "case": name,
        "shape": list(shape),
        "backend": backend,
        "us": seconds * 1e6,
        "gb_s": size / seconds / 1e9,
        "percent_of_copy": 100 * size / seconds / bandwidth,
        "same_bits_as_reference": bits,
    }
    print(
        f"{name:30} {'x'.join(map(str, shape)):14} {backend:14} {found['us']:10.1f} us {found['gb_s']:8.1f} GB/s"
        f" {found['percent_of_copy']:6.1f} %  {'' if bits is None else 'bits equal' if bits else 'BITS DIFFER'}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = torch.device(options.device)
    results = bench(chosen, options.repeats if chosen.type == "cuda" else min(options.repeats, 5))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(chosen), "results": results}, indent=1) + "\n")
