"""What the benchmark of the kernels refuses before it times anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "NVFP5"], "--only NVFP5: part of none of quantize NVFP4, scale given, "),
        (["--device", "gpu"], "--device gpu: there is no such device"),
        (["--shapes", "0"], "--shapes: at least 1, got 0"),
        (["--device", "cuda"], "--device cuda: there is no such device"),
    ],
)
def test_refuses_in_one_line(options: list[str], words: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"bench_kernels.py: error: {words}")
    assert done.stdout == ""
