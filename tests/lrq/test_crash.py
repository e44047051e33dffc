"""Whatever stops a run, its target is whole or not there, and the same command ends with the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lrq.pipeline
from checkpoints import convert, load, normal, run, save, transformer
from lrq import quantize
from lrq.errors import InputError
from lrq.execution import Execution
from power import Disk, PowerLossError

KILLS = int(os.environ.get("LRQ_KILLS", "15"))
FLAGS = {"nvfp4": True, "simple": True}


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", transformer())


@pytest.fixture
def undisturbed(tmp_path, source) -> bytes:
    quantize(source, tmp_path / "undisturbed", **FLAGS)
    return (tmp_path / "undisturbed").read_bytes()


@pytest.fixture(autouse=True)
def every_tensor_is_synced(monkeypatch):
    monkeypatch.setattr("lrq.checkpoint.writer.SYNC_BYTES", 1)


def crash(source: Path, output: Path, seed: int, calls: int, **more: object) -> bool:
    """Run until the power fails; False if the run was over before."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, seed, calls)
        with contextlib.suppress(PowerLossError):
            quantize(source, output, **FLAGS, **more)
    if disk.off:
        disk.lose()
    return disk.off


def test_power_lost_at_any_call(tmp_path, source, undisturbed):
    calls, old = 0, b"what was there before"
    output = tmp_path / "out.safetensors"
    crashed = True
    while crashed:
        output.write_bytes(old)
        crashed = crash(source, output, calls, calls)
        assert output.read_bytes() in (old, undisturbed), f"after {calls} calls"
        quantize(source, output, **FLAGS)
        assert output.read_bytes() == undisturbed, f"after {calls} calls"
        assert not list(tmp_path.glob("out*partial*")), f"after {calls} calls"
        calls += 1
    assert calls > 40


@pytest.mark.parametrize("seed", range(12))
def test_power_lost_again_and_again(tmp_path, source, undisturbed, seed):
    lot = random.Random(seed)
    output = tmp_path / "out.safetensors"
    while crash(source, output, lot.randrange(1 << 30), lot.randrange(5, 40)):
        assert not output.exists() or output.read_bytes() == undisturbed
    assert output.read_bytes() == undisturbed


def test_power_lost_in_a_run_of_shards(tmp_path, source):
    shards = {"execution": Execution(shard_size="5kB")}
    (tmp_path / "good").mkdir()
    quantize(source, tmp_path / "good" / "out.safetensors", **FLAGS, **shards)
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    assert len(good) > 2
    for calls in range(0, 90, 2):
        folder = tmp_path / str(calls)
        folder.mkdir()
        crash(source, folder / "out.safetensors", calls, calls, **shards)
        if (folder / "out.safetensors.index.json").exists():
            names = {path.name for path in folder.iterdir()} - {"out.safetensors.index.json.partial.journal"}
            assert {name: (folder / name).read_bytes() for name in names} == good
        quantize(source, folder / "out.safetensors", **FLAGS, **shards)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


NURSERY = """
import os, random, signal, sys, time
import lrq.run, lrq.checkpoint.writer
import lrq.pipeline
from lrq import quantize
source, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
lrq.checkpoint.writer.SYNC_BYTES = 1
lot = random.Random(5)

def child(output):
    pid = os.fork()
    if not pid:
        quantize(source, output, nvfp4=True, simple=True)
        os._exit(0)
    return pid

quantize(source, folder + "/warm", nvfp4=True, simple=True)
started = time.monotonic()
assert os.waitpid(child(folder + "/good"), 0)[1] == 0
whole = time.monotonic() - started
good = open(folder + "/good", "rb").read()
killed = resumed = 0
for number in range(20 * kills):
    # On a machine that others use a run may be over before its time: it counts as none.
    if killed == kills:
        break
    output = f"{folder}/{number}"
    pid = child(output)
    time.sleep(lot.random() * whole)
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if os.path.exists(output):
        assert open(output, "rb").read() == good
    journal = output + ".partial.journal"
    resumed += os.path.exists(journal) and open(journal).read().count("tensor") > 0
    assert os.waitpid(child(output), 0)[1] == 0
    assert open(output, "rb").read() == good
    assert not os.path.exists(journal) and not os.path.exists(output + ".partial")
print(killed, resumed)
"""


def test_killed_at_random_times(tmp_path):
    tensors = {f"blocks.{i}.fc.weight": normal(256, 256, seed=i) for i in range(20)}
    source = save(tmp_path / "many.safetensors", tensors)
    command = [sys.executable, "-c", textwrap.dedent(NURSERY), source, tmp_path, str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed == KILLS and resumed > KILLS / 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_in_the_middle_keeps_what_is_done(tmp_path, source, undisturbed, monkeypatch, number):
    left = [12]
    real = os.pwrite

    def fail(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", fail)
    output = tmp_path / "out.safetensors"
    # One after the other: of what threads write, nothing may be vouched for before the disk fails.
    result = run("convert", "-i", source, "-o", output, "--nvfp4", "--simple", "--low_memory")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and os.strerror(number) in line and "the same command goes on from there" in line
    assert not output.exists() and list(tmp_path.glob("out*.partial.journal"))
    monkeypatch.undo()
    convert(source, output, "--nvfp4")
    assert output.read_bytes() == undisturbed


def test_a_source_that_can_not_be_read_in_the_middle(tmp_path, source, undisturbed, monkeypatch):
    left = [9]
    real = os.preadv

    def fail(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, "preadv", fail)
    output = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match=r"in\.safetensors: can't be read: Input/output error; \d+ of"):
        quantize(source, output, execution=Execution(low_memory=True), **FLAGS)
    monkeypatch.undo()
    quantize(source, output, **FLAGS)
    assert output.read_bytes() == undisturbed


@pytest.mark.parametrize("change", ["source", "settings"])
def test_another_source_or_setting_is_refused_with_the_reason(tmp_path, source, undisturbed, change):
    output = tmp_path / "out.safetensors"
    assert crash(source, output, 1, 30)
    flags = ["--nvfp4"]
    if change == "source":
        os.utime(source, ns=(1, 1))
    else:
        flags += ["--coherence", "2"]
    result = run("convert", "-i", source, "-o", output, "--simple", *flags)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "--restart begins again" in line
    assert ("the source's time of change was" if change == "source" else "--coherence was 4.0, is 2.0") in line
    convert(source, output, *flags, "--restart")
    assert load(output).tensors and not list(tmp_path.glob("out*partial*"))


def test_finished_layers_are_not_computed_again(tmp_path, source, undisturbed, monkeypatch):
    output = tmp_path / "out.safetensors"
    seen = []

    def stop_after_two(layer):
        seen.append(layer)
        if len(seen) == 2:
            raise KeyboardInterrupt

    # One after the other: threads may have written every layer before the second is heard of.
    in_order = Execution(low_memory=True)
    with pytest.raises(KeyboardInterrupt, match="tensors are kept in"):
        quantize(source, output, on_layer=stop_after_two, execution=in_order, **FLAGS)
    computed = []
    real = lrq.pipeline.quantize_layer
    monkeypatch.setattr("lrq.pipeline.quantize_layer", lambda *args: (computed.append(args), real(*args))[1])
    summary = quantize(source, output, **FLAGS)
    assert output.read_bytes() == undisturbed and 0 < len(computed) < len(summary.layers) == 4


def test_a_source_that_changes_meanwhile_makes_no_output(tmp_path, source):
    output = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="changed while it was converted"):
        quantize(source, output, simple=True, on_layer=lambda _: os.utime(source, ns=(1, 1)))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_an_interrupted_call_says_what_remains(tmp_path, source):
    # A shell starts what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(layer):
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt, match="tensors are kept in"):
            quantize(source, tmp_path / "out.safetensors", on_layer=stop, **FLAGS)
    finally:
        signal.signal(signal.SIGINT, before)
