"""Speed of the kernels: every operation, backend and shape, and peers beside them, in one run.

    python benchmarks/bench_kernels.py [--device cuda] [--json benchmarks/results/kernels-h200.json] [--only NVFP4]

µs of the GPU alone (a CUDA graph is replayed: no launch is waited for), GB/s of ideal bytes (inputs read once, outputs
written once) and their share of the bandwidth of a copy of 1 GiB in the same run (CPU: of a copy of the same bytes).
Inputs and outputs rotate beyond the caches. The bits of each kernel are compared with the reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lrq_kernels
from kernel_cases import Case, Run, cases, peer
from lrq_kernels.dispatch import BACKENDS, refusal
from measure import call_microseconds, copy_bandwidth, machine, seconds_of

ROTATE_BYTES = 200e6
PEERS = ("kitchen", "torchao")
CEILING = "copy of as many bytes"
OWN_ORDER = {("rounding_step", "triton"): 2}
"""Only so many outputs are compared: the sums that follow are added in an order of their own (tests/tolerances.py)."""
SHAPES = {"cuda": [(3072, 3072), (14336, 4096), (18432, 5120), (64, 1024, 1024)], "cpu": [(3072, 3072)]}
Row = dict[str, object]


def weights(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """bf16 weights, together more than the caches hold."""
    count = max(2, round(ROTATE_BYTES / (torch.Size(shape).numel() * 2))) if device.type == "cuda" else 2
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
    return [(torch.randn(*shape, generator=g, device=device) * 0.02).bfloat16() for g in generators]


def tensors(found: object) -> list[Tensor]:
    return [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)]


def same_bits(run: Run, operation: str, backend: str) -> bool:
    results = []
    for chosen in (backend, "reference"):
        with lrq_kernels.use_backend(chosen):
            outputs = tensors(run())[: OWN_ORDER.get((operation, backend))]
            results.append([t.contiguous().reshape(-1).view(torch.uint8) for t in outputs])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _outputs_like(found: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in found]


class Bench:
    """Collects and prints the rows of one device."""

    def __init__(self, device: torch.device, compare_all: bool, backends: list[str], peers: list[str]) -> None:
        self.device, self.compare_all, self.backends, self.peers = device, compare_all, backends, peers
        self.bandwidth = copy_bandwidth(device)
        self.rows: list[Row] = [{"copy_gb_s": self.bandwidth / 1e9}]
        print(f"{machine(device)}\ncopy bandwidth {self.bandwidth / 1e9:.0f} GB/s")

    def case(self, case: Case, samples: list[Tensor], first: bool) -> None:
        """Time every backend and peer that can do it; ``first``: the shape at which the slow reference is timed too."""
        arguments = [case.arguments(x) for x in samples]
        operation = getattr(lrq_kernels, case.operation)
        runs = [partial(operation, *args) for args in arguments]
        size = sum(t.numel() * t.element_size() for t in (*tensors(arguments[0]), *tensors(runs[0]())))
        for backend in self.backends:
            slow = backend == "reference"
            if refusal(case.operation, backend, arguments[0]) is not None or (slow and not first):
                continue
            bits = None if slow or not (first or self.compare_all) else same_bits(runs[0], case.operation, backend)
            with lrq_kernels.use_backend(backend):
                self.add(case.name, samples[0], backend, runs[:2] if slow else runs, size, bits)
        for name in case.peers:
            if name.partition(" ")[0] not in self.peers:
                continue
            try:
                calls = [peer(name, args) for args in arguments]
                calls[0]()
            except Exception as error:  # whatever a peer does, the benchmark goes on and says so
                print(f"{case.name:30} {name}: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}")
                continue
            self.add(case.name, samples[0], name, calls, size, None)

    def add(self, case: str, x: Tensor, who: str, runs: list[Run], size: int, bits: bool | None) -> None:
        """Time ``runs``, the same work on different memory."""
        seconds = seconds_of(runs, self.device)
        shape = "x".join(map(str, x.shape))
        bandwidth = self.bandwidth if self.device.type == "cuda" else copy_bandwidth(self.device, size // 2)
        percent = 100 * size / seconds / bandwidth
        row = {"case": case, "shape": shape, "who": who, "us": seconds * 1e6, "gb_s": size / seconds / 1e9}
        self.rows.append({**row, "percent_of_copy": percent, "same_bits_as_reference": bits})
        verdict = "" if bits is None else "bits equal" if bits else "BITS DIFFER"
        print(
            f"{case:32} {shape:14} {who:22} {seconds * 1e6:10.1f} us {size / seconds / 1e9:8.1f} GB/s"
            f" {percent:6.1f} %  {verdict}",
            flush=True,
        )

    def ceiling(self, samples: list[Tensor]) -> None:
        """A plain copy of as many bytes as 8-bit codes and their weights take: small shapes reach no more than this."""
        parts = [x.view(-1)[: x.numel() // 4 * 3] for x in samples]
        copies = [torch.empty_like(part) for part in parts]
        size = 2 * parts[0].numel() * parts[0].element_size()
        runs = [partial(torch.Tensor.copy_, *pair) for pair in zip(copies, parts, strict=True)]
        self.add(CEILING, samples[0], "torch", runs, size, None)

    def overhead(self) -> None:
        """What a call costs the host: tiny inputs, nothing waited for."""
        x = torch.randn(16, 64, device=self.device)
        scale = torch.tensor(0.1, device=self.device)
        found = {
            "torch.neg": call_microseconds(partial(torch.neg, x), self.device),
            "quantize_nvfp4": call_microseconds(partial(lrq_kernels.quantize_nvfp4, x, scale), self.device),
            "quantize_nvfp4, bound": call_microseconds(lrq_kernels.bind("quantize_nvfp4", x, scale), self.device),
            "its outputs": call_microseconds(partial(_outputs_like, lrq_kernels.quantize_nvfp4(x, scale)), self.device),
        }
        call, launch, outputs = list(found.values())[1:]
        found["overhead"] = call - launch - outputs
        self.rows.append({"host_us_per_call": found})
        print("host us per call:", "  ".join(f"{name} {us:.1f}" for name, us in found.items()))


def parsed() -> argparse.Namespace:
    """The options, checked before anything is timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--shapes", type=int, default=4, help="so many of the shapes")
    parser.add_argument(
        "--compare-all", action="store_true", help="compare the bits at every shape, not only the first"
    )
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    devices = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if options.device not in devices or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {options.device}: there is no such device")
    if options.shapes < 1:
        parser.error(f"--shapes: at least 1, got {options.shapes}")
    options.cases = [case for case in cases() if options.only.lower() in case.name.lower()]
    if not options.cases:
        parser.error(f"--only {options.only}: part of none of {', '.join(case.name for case in cases())}")
    return options


if __name__ == "__main__":
    options = parsed()
    bench = Bench(torch.device(options.device), options.compare_all, options.backends, options.peers)
    bench.overhead()
    for i, shape in enumerate(SHAPES[bench.device.type][: options.shapes]):
        matrices = weights(shape, bench.device)
        bench.ceiling(matrices)
        for case in options.cases:
            bench.case(case, matrices, first=i == 0)
    if options.json:
        results = {"machine": machine(bench.device), "results": bench.rows}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
