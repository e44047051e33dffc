"""Every CUDA and Triton kernel under compute-sanitizer: no access beyond memory, no race in shared memory.

    python benchmarks/sanitize_kernels.py [--tools memcheck racecheck] [--backends cuda triton]

Whole and ragged matrices, batches, rows that start anywhere, in every dtype. Exits with 1 where something was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import lrq_kernels
from kernel_cases import cases
from lrq_kernels.dispatch import refusal

TOOLS = ("memcheck", "racecheck")
BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((256, 1024), (272, 1040), (97, 333), (3, 128, 512), (640, 2048))
FOUND = 9
"""Exit status of compute-sanitizer where it found something."""


def weights() -> Iterator[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    for dtype in DTYPES:
        for shape in SHAPES:
            # In memory of its own, so that what lies beyond is nobody's; then as the last columns of a wider matrix.
            for offset in (0, 1, 16):
                wide = torch.randn(*shape[:-1], shape[-1] + offset, generator=generator, device="cuda")
                yield (wide * 0.02).to(dtype)[..., offset:]


def run(backend: str) -> None:
    """What compute-sanitizer watches."""
    count = 0
    for x in weights():
        for case in cases():
            try:
                arguments = case.arguments(x)
            except (ValueError, RuntimeError):
                continue  # a shape that the operation doesn't take
            if refusal(case.operation, backend, arguments) is not None:
                continue
            with lrq_kernels.use_backend(backend):
                try:
                    getattr(lrq_kernels, case.operation)(*arguments)
                except ValueError:
                    continue
            count += 1
    torch.cuda.synchronize()
    print(f"{count} calls of {backend} kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--run", choices=BACKENDS, help="the part that runs inside compute-sanitizer")
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return 0
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH; it comes with CUDA")
    # Without the allocator's cache every tensor ends where its memory does.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = 0
    for tool in options.tools:
        for backend in options.backends:
            print(f"{tool}, {backend}", flush=True)
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
            status = subprocess.run([*command, sys.executable, __file__, "--run", backend], env=environment).returncode
            failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
