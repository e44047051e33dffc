"""Speed and memory of whole conversions, beside each stage alone and beside ctq, in one run.

    python benchmarks/bench_convert.py [--device cpu] [--blocks 5] [--folder /dev/shm] [--ctq .../bin/convert_to_quant]
        [--json benchmarks/results/convert-cpu.json]

A bf16 file with the shapes of FLUX (226 MB a block), `--simple --comfy_quant`. Every conversion is a process of its
own, its time that of the whole process; "run" leaves out the start of Python and torch. A stage alone: the same bytes
are read, copied up, quantized, copied down or written, with nothing else going on. The share is the slowest stage's
time over the run's: 100 % is as fast as that stage allows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flux_like import LINEARS, write_flux_like
from lrq.checkpoint import disk
from lrq.formats import FORMATS
from lrq.staging.memory import PIECE
from measure import machine

FLAGS = {
    "fp8": [],
    "nvfp4": ["--nvfp4"],
    "mxfp8": ["--mxfp8"],
    "int8-row": ["--int8", "--scaling_mode", "row"],
}
COHERENCE = 4.0
THREADS = min(8, max(2, os.cpu_count() or 1))
LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
said = done.stdout + done.stderr
print(json.dumps({"code": done.returncode, "said": said, "process_s": seconds, "peak_bytes": peak}))
"""
"""Small, because a process's peak begins with that of the one that started it."""


def launched(command: list[str]) -> dict:
    """Time and peak memory of a process."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    said = found.pop("said")
    if found.pop("code"):
        raise SystemExit(f"{' '.join(command)}:\n{said}")
    run = re.search(r" in ([\d.]+) s\n", said)
    memory = re.search(r"peak memory ([\d.]+) (MB|GB), predicted ([\d.]+) (MB|GB)", said)
    if run and memory:
        found["run_s"] = float(run[1])
        for name, value, unit in (("stated", *memory.group(1, 2)), ("predicted", *memory.group(3, 4))):
            found[f"{name}_bytes"] = float(value) * {"MB": 1e6, "GB": 1e9}[unit]
    return found


def _pieces(size: int, work: Callable[[int, int], object]) -> float:
    """Seconds that threads take for ``work(begin, length)`` on all pieces."""
    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda begin: work(begin, min(PIECE, size - begin)), range(0, size, PIECE)):
            pass
    return time.perf_counter() - started


def read_alone(source: Path) -> float:
    """Every byte of the source into memory."""
    # What is read is looked at by nobody: threads may share memory.
    views = [memoryview(bytearray(PIECE)) for _ in range(THREADS)]
    with source.open("rb", buffering=0) as file:

        def read(begin: int, length: int) -> None:
            disk.read_at(file.fileno(), views[begin // PIECE % THREADS][:length], begin)

        return _pieces(source.stat().st_size, read)


def write_alone(path: Path, size: int) -> float:
    """As many bytes to the disk, synced."""
    piece = memoryview(os.urandom(PIECE))
    started = time.perf_counter()
    fd = disk.open_to_write(path)
    try:
        disk.reserve(fd, size)
        _pieces(size, lambda begin, length: disk.write_at(fd, piece[:length], begin))
        os.fsync(fd)
    finally:
        os.close(fd)
        path.unlink()
    return time.perf_counter() - started


def copy_alone(size: int, device: torch.device, up: bool) -> float:
    """As many bytes to or from the GPU, through pinned memory."""
    host = torch.empty(4 * PIECE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    target, origin = (there, host) if up else (host, there)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(-(-size // host.numel())):
        target.copy_(origin, non_blocking=True)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def compute_alone(name: str, blocks: int, device: torch.device) -> float:
    """The kernels on the weights of all blocks, in memory: those of one, as often."""
    fmt = FORMATS[name]
    weights = [(torch.randn(shape, device=device) * 0.02).bfloat16() for shape in LINEARS.values()]
    fmt.quantize(weights[0], COHERENCE)
    _wait(device)
    started = time.perf_counter()
    for w in weights:
        fmt.quantize(w, COHERENCE)
    _wait(device)
    return (time.perf_counter() - started) * blocks


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(name: str, source: Path, blocks: int, device: torch.device, ctq: str | None) -> dict:
    """One format: stages alone, the conversion, ctq's."""
    size, output = source.stat().st_size, source.with_name(f"out-{name}.safetensors")
    common = ["-i", str(source), "-o", str(output), "--simple", "--comfy_quant", *FLAGS[name]]
    read_s = read_alone(source)
    lrq = launched([sys.executable, "-m", "lrq.cli", "convert", *common, "--device", device.type])
    stored = output.stat().st_size
    output.unlink()
    stages = {"read": read_s, "quantize": compute_alone(name, blocks, device)}
    if device.type == "cuda":
        stages |= {"upload": copy_alone(size, device, True), "download": copy_alone(stored, device, False)}
    stages["write"] = write_alone(source.with_name("alone"), stored)
    slowest = max(stages, key=lambda stage: stages[stage])
    row = {
        "format": name,
        "source_bytes": size,
        "stages_s": stages,
        "slowest": slowest,
        **lrq,
        "gb_s": size / lrq["run_s"] / 1e9,
        "share_of_slowest": stages[slowest] / lrq["run_s"],
    }
    if ctq:
        row["ctq"] = launched([ctq, *common, "--low-memory"])
        output.unlink()
        row["times_ctq"] = row["ctq"]["process_s"] / lrq["process_s"]
        row["memory_of_ctq"] = lrq["peak_bytes"] / row["ctq"]["peak_bytes"]
    return row


def learned(source: Path, device: torch.device) -> dict:
    """Learned NVFP4: time, and the share of it in which the GPU was computing, from the first kernel to the last."""
    output = source.with_name("out-learned.safetensors")
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watch:
        command = [sys.executable, "-m", "lrq.cli", "convert", "-i", str(source), "-o", str(output), "--nvfp4"]
        run = launched([*command, "--device", device.type])
        watch.terminate()
        samples = [int(line) for line in watch.communicate()[0].split()]
    output.unlink()
    busy = [i for i, share in enumerate(samples) if share]
    during = samples[busy[0] : busy[-1] + 1]
    size = source.stat().st_size
    return {"source_bytes": size, "busy_percent": sum(during) / len(during), **run, "gb_s": size / run["run_s"] / 1e9}


def show(row: dict) -> None:
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row["stages_s"].items())
    print(
        f"{row['format']}: {row['process_s']:.1f} s, run {row['run_s']:.1f} s = {row['gb_s']:.2f} GB/s, "
        f"{100 * row['share_of_slowest']:.0f} % of {row['slowest']} alone; peak {row['peak_bytes'] / 1e6:.0f} MB, "
        f"predicted {row['predicted_bytes'] / 1e6:.0f} MB"
    )
    print(f"    alone: {stages}")
    if "ctq" in row:
        print(
            f"    ctq: {row['ctq']['process_s']:.1f} s ({row['times_ctq']:.1f} times ours), peak "
            f"{row['ctq']['peak_bytes'] / 1e6:.0f} MB (ours is {100 * row['memory_of_ctq']:.0f} %)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--formats", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument("--ctq", help="the command convert_to_quant of convert-to-quant")
    parser.add_argument("--learned", type=int, default=0, help="blocks of a learned conversion, too; on a GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    source = write_flux_like(args.folder / f"flux-like-{args.blocks}.safetensors", args.blocks)
    try:
        # Libraries come from the disk only once.
        launched([sys.executable, "-m", "lrq.cli", "plan", str(source), "--device", device.type])
        # Memory, or a disk, that nobody wrote to before is slower at first: that is no format's fault.
        write_alone(source.with_name("alone"), source.stat().st_size)
        rows = [measured(name, source, args.blocks, device, args.ctq) for name in args.formats]
    finally:
        source.unlink()
    for row in rows:
        show(row)
    results = {"machine": machine(device), "results": rows}
    if args.learned:
        source = write_flux_like(args.folder / f"flux-like-{args.learned}.safetensors", args.learned)
        try:
            found = results["learned"] = learned(source, device)
        finally:
            source.unlink()
        print(f"learned nvfp4: {found['gb_s']:.2f} GB/s, the GPU computed {found['busy_percent']:.0f} % of the time")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
