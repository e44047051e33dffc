"""Learned rounding on synthetic layers: error against round-to-nearest with amax scales, and time.

    python benchmarks/bench_rounding.py [--sizes 512x768] [--json FILE]           quality, any device
    python benchmarks/bench_rounding.py --speed [--models FOLDER] [--json FILE]   speed, on a GPU; beside ctq if it can
                                                                                  be imported (package convert_to_quant)

Quality is measured in the exact top-k subspace (float64). ``low rank`` layers have singular values i^-0.8 of a quarter
of the rank over Gaussian noise and an outlier column in 256, ``student`` layers Student-t weights with outlier columns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.formats import FORMATS, Format
from lrq.rounding.metric import leading_subspace, leading_subspaces, subspace_size, weight_metric
from lrq.rounding.solve import SOLVERS, quantize_layer, quantize_layers
from lrq.staging.memory import GPU_WORKERS
from lrq.staging.workers import Workers
from measure import machine

REPEATS = 5
STRONG = Rounding(projection="both", top_p=0.2, plain_weight=0.1)
SETTINGS = {"default": Rounding(), "both, 0.2, 0.1": STRONG}
TRIED = ("nvfp4", "mxfp8", "fp8", "int8-row")


def low_rank(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    rank = min(rows, columns) // 4
    sigma = torch.arange(1, rank + 1, device=generator.device) ** -0.8
    left, right = (torch.randn(n, rank, generator=generator, device=generator.device) for n in (rows, columns))
    signal = left * sigma @ right.mT
    return _with_outliers(0.7 * signal / signal.std() + 0.7 * torch.randn_like(signal), 4.0)


def student(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(6, rows, columns, generator=generator, device=generator.device)
    return _with_outliers(normal[0] / normal[1:].square().mean(0).sqrt(), 4.0)


def _with_outliers(w: Tensor, factor: float) -> Tensor:
    w[:, ::256] *= factor
    return (w * (0.02 / w.std())).bfloat16()


LAYERS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {"low rank": low_rank, "student": student}


class Judge:
    """Projected and Frobenius error of stored tensors, in units of round-to-nearest with amax scales."""

    def __init__(self, fmt: Format, w: Tensor, rounding: Rounding) -> None:
        self.fmt, self.exact = fmt, w.double()
        k = subspace_size(tuple(w.shape), rounding, fmt.top_p)
        self.left, self.right, _ = leading_subspaces(self.exact / self.exact.abs().amax(), k)
        if rounding.projection == "input":
            self.left = None
        self.nearest = self._errors(fmt.dequantize(fmt.quantize(w, None), tuple(w.shape)))

    def ratios(self, tensors: dict[str, Tensor]) -> tuple[float, float]:
        return self.ratios_of(self.fmt.dequantize(tensors, tuple(self.exact.shape)))

    def ratios_of(self, restored: Tensor) -> tuple[float, float]:
        projected, plain = self._errors(restored)
        return projected / self.nearest[0], plain / self.nearest[1]

    def _errors(self, restored: Tensor) -> tuple[float, float]:
        error = restored.double() - self.exact
        projected = error @ self.right
        projected = projected if self.left is None else self.left.mT @ projected
        return projected.norm().item(), error.norm().item()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """The median of so many runs."""
    found = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def quality(sizes: list[tuple[int, int]], solvers: list[str], device: torch.device) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for size in sizes:
        for kind, make in LAYERS.items():
            w = make(*size, torch.Generator(device).manual_seed(12345))
            for setting, rounding in SETTINGS.items():
                for name in TRIED:
                    judge = Judge(FORMATS[name], w, rounding)
                    for solver in solvers:
                        chosen = replace(rounding, optimizer=solver)
                        wait(device)
                        started = time.perf_counter()
                        tensors, (outcome,) = quantize_layer(FORMATS[name], w, chosen, 0)
                        wait(device)
                        taken = time.perf_counter() - started
                        projected, frobenius = judge.ratios(tensors)
                        row = {"shape": size, "layer": kind, "setting": setting, "format": name, "solver": solver}
                        row |= {"projected": projected, "frobenius": frobenius, "seconds": taken}
                        rows.append(row | {"iterations": outcome.iterations, "stopped": outcome.stopped})
                        print(
                            f"{size[0]}x{size[1]} {kind:9} {setting:15} {name:9} {solver:10} projected {projected:.3f}"
                            f"  Frobenius {frobenius:.3f}  {taken:.3f} s, {outcome.iterations} {outcome.stopped}",
                            flush=True,
                        )
    return rows


def speed(models: Path | None, device: torch.device) -> list[dict[str, object]]:
    generator = torch.Generator(device).manual_seed(1)
    rows: list[dict[str, object]] = []

    def tell(what: str, value: float) -> None:
        rows.append({"what": what, "seconds": value})
        print(f"{what:60} {value:.4f} s", flush=True)

    nvfp4, big = FORMATS["nvfp4"], low_rank(3072, 12288, generator)
    for setting, rounding in SETTINGS.items():
        quantize_layer(nvfp4, big, rounding, 0)
        run = lambda r=rounding: quantize_layer(nvfp4, big, r, 0)  # noqa: E731
        tell(f"3072x12288 nvfp4, {setting}, median of {REPEATS}", seconds(run, device, REPEATS))
        metric = seconds(lambda r=rounding: weight_metric(big.float()[None], r, nvfp4), device, REPEATS)
        tell(f"  of it the subspace, {setting}", metric)
        if setting != "default":
            _beside_ctq(big, rounding, device, tell, rows)
    small = [low_rank(1024, 1024, generator) for _ in range(64)]
    quantize_layers(nvfp4, small, STRONG, 0)
    tell("64 x 1024x1024 together", seconds(lambda: quantize_layers(nvfp4, small, STRONG, 0), device))
    tell("64 x 1024x1024 one by one", seconds(lambda: [quantize_layer(nvfp4, w, STRONG, 0) for w in small], device))
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (8192, 8192))
    _ = left @ right
    rate = 2 * 8192**3 / (seconds(lambda: [left @ right for _ in range(10)], device) / 10)
    # Of one step with k directions on both sides: EV, U'(EV), UP, (UP)V'.
    k = subspace_size((3072, 12288), STRONG, nvfp4.top_p)
    floor = (4 * 3072 * 12288 * k + 4 * 3072 * k * k) / rate
    tell(f"floor of one step of 3072x12288 at {rate / 1e12:.0f} TFLOP/s", floor)
    if models is not None:
        weights = flux_weights(models)
        for count in (1, GPU_WORKERS):
            what = f"FLUX, {len(weights)} matrices, {count} at a time"
            tell(what, seconds(lambda n=count: from_host_to_host(weights, device, n), device))
    return rows


def _beside_ctq(
    w: Tensor, rounding: Rounding, device: torch.device, tell: Callable[[str, float], None], rows: list
) -> None:
    """The same weight by convert-to-quant's defaults but for 1000 iterations, and both errors."""
    judge = Judge(FORMATS["nvfp4"], w, rounding)
    tensors, _ = quantize_layer(FORMATS["nvfp4"], w, rounding, 0)
    found = {"lrq": judge.ratios(tensors)}
    try:
        from convert_to_quant.converters.learned_nvfp4 import LearnedNVFP4Converter
    except ImportError as error:
        print(f"ctq: {error}")
        return
    LearnedNVFP4Converter(num_iter=2, device=device.type).convert(w)
    converter = LearnedNVFP4Converter(num_iter=1000, device=device.type)
    made: list[tuple] = []
    tell("  the same by ctq, 1000 iterations", seconds(lambda: made.append(converter.convert(w)), device))
    found["ctq"] = judge.ratios_of(made[0][3][: w.shape[0], : w.shape[1]])
    for who, (projected, frobenius) in found.items():
        rows.append({"what": f"3072x12288 nvfp4 by {who}", "projected": projected, "frobenius": frobenius})
        print(f"  error by {who}: projected {projected:.3f}, Frobenius {frobenius:.3f}", flush=True)


def flux_weights(models: Path) -> list[Tensor]:
    """Every large matrix of the model's shape list, on the host; matrices of one shape share their random numbers."""
    tensors = json.loads((models / "flux1_dev.json").read_text())["tensors"]
    shapes = [tuple(shape) for _, shape in tensors.values() if len(shape) == 2 and min(shape) >= 256]
    generator = torch.Generator().manual_seed(3)
    made = {shape: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for shape in dict.fromkeys(shapes)}
    return [made[shape] for shape in shapes]


def from_host_to_host(weights: list[Tensor], device: torch.device, workers: int) -> None:
    def convert(w: Tensor) -> list[Tensor]:
        tensors, _ = quantize_layer(FORMATS["nvfp4"], w.to(device), Rounding(), 0)
        return [tensor.cpu() for tensor in tensors.values()]

    with Workers(workers, device) as pool:
        for future in [pool.submit(convert, w) for w in weights]:
            future.result()


def subspaces(sizes: list[tuple[int, int]], device: torch.device) -> None:
    """Share of the exact subspace that a range finder with q power iterations finds, and its time."""
    for size in sizes:
        w = low_rank(*size, torch.Generator(device).manual_seed(2)).float()
        w /= w.abs().max()
        k = subspace_size(size, STRONG, FORMATS["nvfp4"].top_p)
        exact = leading_subspace(w.double(), k)[0].float()
        run = lambda w=w, k=k: leading_subspace(w, k)[0]  # noqa: E731
        run()
        taken = seconds(run, device)
        found = (exact.mT @ run()).square().sum().item() / k
        print(f"{size[0]}x{size[1]} k={k} Gram and eigh, float32: {found:.4f} in {taken:.4f} s", flush=True)
        for iterations in (2, 8):
            run = lambda w=w, k=k, q=iterations: torch.svd_lowrank(w, k + 16, niter=q)[2][:, :k]  # noqa: E731
            run()
            taken = seconds(run, device)
            found = (exact.mT @ run()).square().sum().item() / k
            print(f"{size[0]}x{size[1]} k={k} range finder, {iterations}: {found:.4f} in {taken:.4f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="512x768", help="NxK, separated by commas")
    parser.add_argument("--solvers", default=",".join(s for s in SOLVERS if s not in ("coordinate_descent", "gptq")))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--subspaces", action="store_true")
    parser.add_argument("--models", type=Path, help="folder with flux1_dev.json")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    results: list[dict[str, object]] = []
    if options.subspaces:
        subspaces(sizes, device)
    elif options.speed:
        results = speed(options.models, device)
    else:
        results = quality(sizes, options.solvers.split(","), device)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
