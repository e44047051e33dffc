"""What bounds a kernel: counters of Nsight Compute (ncu) for the cases of bench_kernels.py that are named.

    python benchmarks/profile_kernels.py [--json FILE] [CASE ...]      a case: backend:its name[@NxK]

For every kernel of a case: µs, the share of the peak DRAM bandwidth, the share of cycles in which a scheduler issues an
instruction, how busy the integer units are (ALU: an instruction takes them two cycles), thread instructions a weight,
active threads of a warp, resident warps, and what warps wait for most.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import lrq_kernels
from bench_kernels import weights
from kernel_cases import Case, cases
from measure import machine

SHAPE = (14336, 4096)
CASES = [
    *("cuda:quantize NVFP4, scale given", "cuda:quantize NVFP4", "cuda:quantize NVFP4, best scales"),
    *("cuda:quantize MXFP8, best scales", "cuda:quantize FP8 tensor", "cuda:quantize INT8 block 128"),
    *("cuda:dequantize NVFP4", "cuda:dequantize INT8 block", "cuda:step of rounding, E2M1"),
    *("triton:quantize NVFP4, best scales", "triton:quantize INT8 row, Hadamard 256", "triton:step of rounding, E2M1"),
    *("cuda:quantize NVFP4, scale given@3072x3072", "cuda:quantize NVFP4@3072x3072"),
]
STALLS = ("long_scoreboard", "short_scoreboard", "barrier", "math_pipe_throttle", "wait", "lg_throttle", "mio_throttle")
STALLS += ("no_instruction", "branch_resolving", "dispatch_stall", "not_selected")
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes": "dram__bytes.sum",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu_percent": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "fma_percent": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__thread_inst_executed.sum",
    "threads": "smsp__thread_inst_executed_per_inst_executed.ratio",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    **{name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}
UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
BETWEEN = "cos_kernel"
"""Part of the name of the kernel that stands between two cases."""


def parsed(name: str) -> tuple[str, str, tuple[int, int]]:
    """Backend, name of the case, and shape."""
    backend, _, rest = name.partition(":")
    case, _, shape = rest.partition("@")
    rows, columns = map(int, shape.split("x")) if shape else SHAPE
    return backend, case, (rows, columns)


def chosen(names: list[str]) -> list[tuple[str, Case, tuple[int, int]]]:
    """Backend, case and shape of every name."""
    every = {case.name: case for case in cases()}
    return [(backend, every[case], shape) for backend, case, shape in map(parsed, names)]


def run(names: list[str]) -> None:
    """What ncu watches: every case once, after it has run unwatched."""
    picked = chosen(names)
    made = {shape: weights(shape, torch.device("cuda"))[0] for *_, shape in picked}
    prepared = [(backend, case, case.arguments(made[shape])) for backend, case, shape in picked]
    between = torch.ones(32, device="cuda")
    for watched in (False, True):
        torch.cuda.synchronize()
        if watched:
            torch.cuda.profiler.start()
        for backend, case, arguments in prepared:
            between.cos_()
            with lrq_kernels.use_backend(backend):
                getattr(lrq_kernels, case.operation)(*arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profiled(names: list[str]) -> list[dict[str, object]]:
    """Counters of every kernel, in the order in which they ran."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        command = ["ncu", "--profile-from-start", "off", "--csv", "--page", "raw", "--log-file", str(log)]
        command += ["--metrics", ",".join(METRICS.values()), sys.executable, __file__, "--run", *names]
        subprocess.run(command, check=True)
        lines = [line for line in log.read_text().splitlines() if line.startswith('"')]
    units, *rows = csv.DictReader(lines)
    found, position = [], -1
    for row in rows:
        if BETWEEN in row["Kernel Name"]:
            position += 1
            continue
        values = {}
        for name, metric in METRICS.items():
            values[name] = float(row[metric].replace(",", "")) * UNITS.get(units[metric], 1.0)
        values["instructions_a_weight"] = values.pop("instructions") / math.prod(parsed(names[position])[2])
        stalls = {name: values.pop(name) for name in STALLS}
        waits = max((name for name in stalls if name != "not_selected"), key=lambda name: stalls[name])
        kernel = row["Kernel Name"].partition("(")[0]
        found.append({"case": names[position], "kernel": kernel, **values, "waits_for": waits, "stalls": stalls})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--run", action="store_true", help="the part that runs inside ncu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run:
        run(options.cases)
    else:
        results = profiled(options.cases)
        for one in results:
            print(
                f"{one['case']:40} {one['kernel'][:40]:40} {one['us']:7.1f} us, DRAM {one['dram_percent']:3.0f} %, "
                f"issue {one['issue_percent']:3.0f} %, ALU {one['alu_percent']:3.0f} %, "
                f"{one['instructions_a_weight']:6.1f} instructions a weight, "
                f"{one['threads']:4.1f} of 32 threads, warps {one['warps_percent']:3.0f} %, {one['waits_for']}"
            )
        if options.json:
            about = {"machine": machine(torch.device("cuda")), "shape": SHAPE, "results": results}
            options.json.write_text(json.dumps(about, indent=1) + "\n")
