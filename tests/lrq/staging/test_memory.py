"""Memory is known before the start, kept, and its bounds are refused where a layer can't fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lrq.pipeline
from checkpoints import normal, run, save
from lrq import quantize
from lrq.calibration.simulate import standard_normal
from lrq.calibration.stats import save_stats
from lrq.errors import InputError, UnfinishedError
from lrq.execution import Execution, parse_size
from lrq.staging.conveyor import Conveyor
from lrq.staging.memory import Budget, StoppedError
from lrq.staging.places import Host

SIMPLE = {"simple": True}
MEGA = 10**6


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Layers of 8 and 16 MB, and as much that is only copied."""
    tensors = {f"blocks.{i}.fc.weight": normal(1024 * (1 + i % 2), 4096, seed=i).bfloat16() for i in range(4)}
    tensors["embedding"] = normal(4096, 1024)
    return save(tmp_path_factory.mktemp("memory") / "in.safetensors", tensors)


def launch(source: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the peak of this one is another's."""
    command = [sys.executable, "-m", "lrq.cli", "convert", "-i", source, "-o", output, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)


def peaks(source: Path, output: Path, *flags: str) -> tuple[float, float]:
    """Measured and predicted, in MB."""
    done = launch(source, output, *flags)
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak memory ([\d.]+) MB, predicted ([\d.]+) MB", done.stderr)
    assert found is not None, done.stderr
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("flags", "over"),
    # Learned rounding is predicted for the format that takes most.
    [(("--nvfp4", "--simple"), 1.15), (("--low_memory", "--simple"), 1.15), (("--int8", "--num_iter", "1"), 1.3)],
)
def test_the_peak_is_as_predicted(tmp_path, source, flags, over):
    measured, predicted = peaks(source, tmp_path / "out.safetensors", *flags)
    assert measured <= predicted <= over * measured


@pytest.mark.parametrize("flags", [("--nvfp4",), ("--int8",), ("--int8", "--scaling_mode", "row", "--convrot")])
def test_without_kernels_the_peak_is_as_predicted_too(tmp_path, source, monkeypatch, flags):
    """PyTorch holds what a kernel has in registers."""
    monkeypatch.setenv("LRQ_BACKEND", "reference")
    measured, predicted = peaks(source, tmp_path / "out.safetensors", *flags, "--simple")
    assert measured <= predicted
    if flags == ("--nvfp4",):
        bound = measured - 50
        assert peaks(source, tmp_path / "b.safetensors", *flags, "--simple", "--max_ram", f"{bound}MB")[0] <= bound


@pytest.mark.parametrize("fmt", ["--nvfp4", "--mxfp8"])
def test_a_bound_is_kept_and_changes_no_byte(tmp_path, source, fmt):
    free = peaks(source, tmp_path / "free.safetensors", fmt, "--simple")
    bound = free[0] - 12
    bounded = peaks(source, tmp_path / "bounded.safetensors", fmt, "--simple", "--max_ram", f"{bound}MB")
    assert bounded[0] <= bound and bounded[1] <= bound + 0.1
    assert (tmp_path / "free.safetensors").read_bytes() == (tmp_path / "bounded.safetensors").read_bytes()


@pytest.mark.parametrize(("bound", "words"), [("1MB", "leaves 0.0 MB"), ("{base}MB", "even in tiles")])
def test_a_bound_too_small_is_refused_before_the_start_with_what_would_do(tmp_path, source, bound, words):
    output = tmp_path / "out.safetensors"
    result = run("convert", "-i", source, "-o", output, "--simple", "--max_ram", "1MB")
    enough = float(re.search(r"raise it to ([\d.]+) MB", result.stderr)[1])
    result = run("convert", "-i", source, "-o", output, "--simple", "--max_ram", bound.format(base=f"{enough - 9:.1f}"))
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "layer blocks." in line and "4096]: needs" in line and words in line
    assert not list(tmp_path.iterdir())


def test_what_is_advised_does(tmp_path, source):
    done = launch(source, tmp_path / "out", "--simple", "--nvfp4", "--max_ram", "1MB")
    advised = re.search(r"raise it to ([\d.]+) MB", done.stderr)[1]
    measured, _ = peaks(source, tmp_path / "out", "--simple", "--nvfp4", "--max_ram", f"{advised}MB")
    assert measured <= float(advised)


@pytest.mark.parametrize("flags", [("--heur",), ("--max_error", "0.5"), ("--target_bits", "6")])
def test_what_is_measured_first_keeps_the_bound_too(tmp_path, source, flags):
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--simple", "--nvfp4", "--max_ram", "1MB", *flags)
    (line,) = result.stderr.splitlines()
    assert "layer blocks.1.fc [2048, 4096]: is measured whole" in line
    advised = re.search(r"raise it to ([\d.]+) MB", line)[1]
    measured, predicted = peaks(source, tmp_path / "out", "--simple", "--nvfp4", "--max_ram", f"{advised}MB", *flags)
    assert max(measured, predicted) <= float(advised)


def test_layers_are_measured_one_after_the_other(tmp_path):
    layers = {f"blocks.{i}.fc.weight": normal(3000, 3000, seed=i) for i in range(2)}
    source = save(tmp_path / "in.safetensors", layers)
    flags = ("--target_bits", "12", "--max_ram")
    refused = launch(source, tmp_path / "out", "--simple", *flags, "1MB").stderr
    assert "layer blocks.0.fc [3000, 3000]: is measured whole" in refused
    assert "layer blocks.0.fc [3000, 3000]: is measured whole" in run("plan", source, *flags, "1MB").stderr
    advised = re.search(r"raise it to ([\d.]+) MB", refused)[1]
    measured, predicted = peaks(source, tmp_path / "out", "--simple", *flags, f"{advised}MB")
    assert max(measured, predicted) <= float(advised)


def test_statistics_leave_the_memory_with_their_layer(tmp_path):
    tensors = {f"blocks.{i}.fc.weight": normal(64, 2048, seed=i).bfloat16() for i in range(16)}
    gram = torch.eye(2048)
    stats = {
        f"blocks.{i}.fc": replace(standard_normal(2048), gram=gram, mean=torch.zeros(2048).double()) for i in range(16)
    }
    source = save(tmp_path / "in.safetensors", tensors)
    save_stats(tmp_path / "stats.safetensors", stats, "measured")
    measured, predicted = peaks(source, tmp_path / "out", "--simple", "--calib", str(tmp_path / "stats.safetensors"))
    assert measured <= predicted


@pytest.mark.parametrize("fmt", ["--nvfp4", "--mxfp8"])
def test_very_wide_rows_are_known_to_take_more(tmp_path, fmt):
    source = save(tmp_path / "in.safetensors", {"wide.weight": normal(2, 2_000_000).bfloat16()})
    measured, predicted = peaks(source, tmp_path / "out.safetensors", "--simple", fmt)
    assert measured <= predicted


def test_tiles_of_another_size_are_not_kept():
    host = Host()
    first, second = host.take(100), host.take(100)
    host.give(first)
    other = host.take(200)
    host.give(second)
    again = host.take(100)
    assert again.data_ptr() != second.data_ptr() and other.numel() == 200
    host.give(again)
    assert host.take(100) is again


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_blocks_of_half_a_megabyte_go_back_to_the_system():
    """In heaps they would stay between what is still needed, and of every thread others."""
    program = """if True:
        import torch
        from lrq.staging.process import resident, return_large_blocks
        return_large_blocks()
        before = resident()
        both = [(torch.ones(147456), torch.ones(8192)) for _ in range(40)]
        kept = [small for _, small in both]
        del both
        print(resident() - before)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert int(done.stdout) < 10 * MEGA


def test_of_many_small_layers_few_are_remembered(tmp_path, monkeypatch):
    begun: list[int] = []
    real = Conveyor.finish
    monkeypatch.setattr(Conveyor, "finish", lambda self: (begun.append(len(self._begun)), real(self)))
    source = save(tmp_path / "in.safetensors", {f"blocks.{i}.fc.weight": normal(16, 16, seed=i) for i in range(1500)})
    quantize(source, tmp_path / "out.safetensors", **SIMPLE)
    assert begun and begun[0] < 2500


def test_learned_rounding_needs_more_and_says_that_simple_does_not(tmp_path, source):
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--max_ram", "1MB")
    # The largest is named, not the first.
    assert "layer blocks.1.fc [2048, 4096]: needs" in result.stderr
    assert "or add --simple, which needs less" in result.stderr


@pytest.mark.parametrize("size", ["", "0", "-1GB", "eight", "1e9", "9" * 40, "5 PB"])
def test_a_size_that_is_none_is_refused(tmp_path, source, size):
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--max_ram", size)
    assert result.exit_code == 2 and "must be a size, as 8GB or 500MiB" in result.stderr


def test_sizes():
    read = {text: parse_size("--max_ram", text) for text in ("5GB", "1.5 GiB", "100000", "2m", "3kib")}
    assert list(read.values()) == [5 * 10**9, 3 * 2**29, 100000, 2 * MEGA, 3072]
    # As programs write what they computed.
    assert parse_size("--max_ram", f"{512.8 - 50}MB") == pytest.approx(462.8e6)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_names_the_layer_its_need_and_what_helps(tmp_path, source, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(lrq.pipeline, "quantize_layer", fail)
    with pytest.raises(UnfinishedError, match=r"layer blocks\.0\.fc \[1024, 4096\]: out of memory") as caught:
        quantize(source, tmp_path / "out.safetensors", **SIMPLE)
    flag = "--max_vram auto" if isinstance(error, torch.OutOfMemoryError) else "--max_ram"
    assert "needs about 12.6 MB" in str(caught.value) and flag in str(caught.value) and "--simple" in str(caught.value)


def test_memory_short_before_the_first_layer_is_one_line_too(tmp_path, source, monkeypatch):
    """As on a GPU whose memory others take."""

    def fails(*_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB")

    monkeypatch.setattr("lrq.staging.process.quantize_layer", fails)
    result = run("convert", "-i", source, "-o", tmp_path / "out.safetensors", "--nvfp4", "--simple")
    assert result.exit_code != 0 and "Traceback" not in result.output
    assert re.search(r"layer \S+ \[.*\]: out of memory of the GPU; it needs about", result.output), result.output
    assert not (tmp_path / "out.safetensors").exists()


def test_memory_short_while_reading_names_the_layer_too(tmp_path, source, monkeypatch):
    def fail(place, size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lrq.staging.places.Host.take", fail)
    for execution in (Execution(), Execution(low_memory=True)):
        with pytest.raises(UnfinishedError, match=r"layer blocks\.\d\.fc .*: out of memory of the GPU"):
            quantize(source, tmp_path / "out.safetensors", execution=execution, **SIMPLE)


def test_a_budget_lets_one_larger_than_all_pass_alone_and_wakes_who_waits_when_it_stops():
    budget = Budget(10)
    budget.take(30)
    budget.give(30)
    budget.take(10)
    budget.stop()
    with pytest.raises(StoppedError):
        budget.take(1)


@pytest.mark.parametrize("settings", [{"execution": Execution(max_vram="much")}, {"max_vram": "much"}])
def test_the_call_takes_the_flags_too(tmp_path, source, settings):
    with pytest.raises(InputError, match="--max_vram much: must be a size"):
        quantize(source, tmp_path / "out", **settings, **SIMPLE)
