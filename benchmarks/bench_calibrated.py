"""Rounding by statistics of the inputs: what it does to MiniLM's embeddings, and how long a large layer takes.

    python benchmarks/bench_calibrated.py [--formats nvfp4] [--json benchmarks/results/calibrated.json]
    python benchmarks/bench_calibrated.py --speed [--shape 4096x14336] [--json FILE]

Quality: 1 - cosine of the embeddings of 512 English sentences, and its ratio to round-to-nearest with amax scales.
The statistics are of 256 other sentences of the same text. Whole files are converted, biases and all.
Speed: one layer with statistics as a file holds them, 512 eigenpairs of E[xx'] where K > 4096; on a GPU, if any.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import lrq
import real_models
from lrq.calibration import Collector, InputStats
from lrq.calibration.accumulator import GRAM_LIMIT, RANK, Accumulator
from lrq.config import Rounding
from lrq.formats import FORMATS
from lrq.rounding.moments import Moments
from lrq.rounding.solve import quantize_layer
from measure import machine

LAYOUTS = {
    "nvfp4": {"nvfp4": True},
    "mxfp8": {"mxfp8": True},
    "fp8": {},
    "int8-row": {"int8": True, "scaling_mode": "row"},
    "int8-row-convrot": {"int8": True, "scaling_mode": "row", "convrot": True},
}
NEAREST = {"simple": True, "scale_search": False}
SIMPLE = {"simple": True}
STEPS = 200
"""Of the discrete solver under statistics, whose objective still falls after a thousand."""
METHODS: dict[str, tuple[dict[str, object], str]] = {
    "nearest": (NEAREST, "no statistics"),
    "best scales": (SIMPLE, "no statistics"),
    "discrete": ({"optimizer": "discrete"}, "no statistics"),
    "nearest, bias": (NEAREST, "with bias"),
    "best scales, weighted": (SIMPLE, "without bias"),
    "best scales, weighted, bias": (SIMPLE, "with bias"),
    f"discrete under V of the statistics, {STEPS} steps": (
        {"optimizer": "discrete", "num_iter": STEPS},
        "without bias",
    ),
    "gptq, amax scales": ({"scale_search": False}, "without bias"),
    "gptq": ({}, "without bias"),
    "gptq, bias (default with --calib)": ({}, "with bias"),
}
"""Settings, and what is made of the statistics."""


def quality(formats: list[str]) -> list[dict[str, object]]:
    """Every method in every format."""
    original = real_models.load_minilm()
    model = real_models.minilm_folder() / "model.safetensors"
    encoder = real_models.MiniLM(real_models.english_sentences())
    embeddings = encoder.embed(original)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        stats, output = Path(folder) / "stats.safetensors", Path(folder) / "out.safetensors"
        collect_statistics(original, stats)
        for name in formats:
            base = 0.0
            for method, (settings, use) in METHODS.items():
                if "scales" in method and not FORMATS[name.removesuffix("-convrot")].has_scale_search:
                    continue
                calib = {} if use == "no statistics" else {"calib": str(stats), "bias_correction": use == "with bias"}
                started = time.perf_counter()
                lrq.quantize(model, output, **LAYOUTS[name], **settings, **calib)
                took = time.perf_counter() - started
                distance = encoder.distance(embeddings, real_models.load_converted(output, original))
                base = base or distance
                rows.append({"format": name, "method": method, "distance": distance, "ratio": distance / base})
                print(f"{name:17} {method:47} {distance:.5f}  {distance / base:.3f}  {took:6.1f} s", flush=True)
    return rows


def collect_statistics(original: dict[str, Tensor], path: Path) -> None:
    """Of 256 sentences that are not evaluated."""
    watcher = real_models.MiniLM(real_models.other_sentences())
    collector = Collector(watcher.model, keys=[name for name in original if name.endswith(".weight")])
    watcher.watch(original, collector)
    collector.save(path)
    print(f"statistics of {collector.tokens} tokens", flush=True)


def speed(rows: int, columns: int) -> list[dict[str, object]]:
    """Seconds of one layer in every format, statistics on the host before and codes on the device after."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    w = (0.02 * torch.randn(rows, columns, generator=generator, device=device)).bfloat16()
    stats = synthetic_statistics(columns, device, generator)
    found: list[dict[str, object]] = []
    for name in LAYOUTS:
        fmt = FORMATS[name]
        if fmt.refusal((rows, columns)) is not None:
            continue
        for _ in range(3):
            seconds, (before, after) = timed(name, w, stats)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        found.append({"format": name, "shape": f"{rows}x{columns}", "seconds": seconds, "peak_gib": peak})
        gain = math.sqrt(after / before)
        print(
            f"{name:17} {rows}x{columns}  {seconds:.3f} s  output error {gain:.3f} of nearest  {peak:.1f} GiB",
            flush=True,
        )
    return found


def timed(name: str, w: Tensor, stats: InputStats) -> tuple[float, tuple[float, float]]:
    """Seconds, and the objective before and after."""
    synchronize(w.device)
    started = time.perf_counter()
    _, (outcome,) = quantize_layer(FORMATS[name], w, Rounding(), 0, Moments(FORMATS[name], stats, w.device, True))
    synchronize(w.device)
    return time.perf_counter() - started, (outcome.objective_before, outcome.objective_after)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synthetic_statistics(columns: int, device: torch.device, generator: torch.Generator) -> InputStats:
    """Of correlated inputs with a mean, some of them loud."""
    accumulator = Accumulator(columns, gram_limit=GRAM_LIMIT, rank=RANK)
    factor = torch.randn(columns // 8, columns, generator=generator, device=device) / math.sqrt(columns // 8)
    for _ in range(8):
        tokens = torch.randn(1024, columns // 8, generator=generator, device=device)
        x = tokens @ factor + 0.3 * torch.randn(1024, columns, generator=generator, device=device) + 0.2
        x[:, ::97] *= 8
        accumulator.update(x)
    stats = accumulator.result()
    assert stats is not None
    return stats


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--shape", default="4096x14336", help="of the layer of --speed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = speed(*map(int, options.shape.split("x"))) if options.speed else quality(options.formats)
    if options.json:
        where = torch.device("cuda" if options.speed and torch.cuda.is_available() else "cpu")
        options.json.write_text(json.dumps({"machine": machine(where), "results": results}, indent=1) + "\n")
