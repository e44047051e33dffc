"""What lrq calibrate and lrq actscale may write, and that what they write is the same every time."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import convert, normal, run, save
from lrq.calibration import collect
from lrq.calibration.stats import load_stats
from lrq.errors import InputError
from measured import inputs, save_for

TENSORS = {
    "layers.0.layer_norm1.weight": normal(64, seed=1),
    "layers.0.self_attn.q_proj.weight": normal(64, 64, seed=2),
}
LAYER = "layers.0.self_attn.q_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.safetensors", TENSORS)


def bad_targets(folder: Path, source: Path) -> list[tuple[object, str]]:
    (folder / "d").mkdir()
    os.mkfifo(folder / "pipe")
    cases: list[tuple[object, str]] = [(source, "output and input are the same file"), ("", "the name is empty")]
    cases += [(folder / "d", "is a folder"), (folder / "pipe", "is a device or a pipe")]
    return [*cases, (folder / "x.json", "lrq writes safetensors"), (folder / "no" / "x", "no such folder")]


def test_calibrate_writes_over_nothing_that_is_read_or_no_file(tmp_path: Path, source: Path) -> None:
    before = source.read_bytes()
    for output, word in bad_targets(tmp_path, source):
        result = run("calibrate", "--simulate", source, "-o", output)
        assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1, output
    assert source.read_bytes() == before and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_actscale_and_convert_keep_what_they_read(tmp_path: Path, source: Path) -> None:
    stats = save_for(tmp_path / "stats.safetensors", {LAYER: inputs(100, 64)})
    convert(source, tmp_path / "q.safetensors")
    before = stats.read_bytes()
    for output, word in [*bad_targets(tmp_path, tmp_path / "q.safetensors"), (stats, "output and input are the same")]:
        result = run("actscale", tmp_path / "q.safetensors", "--calib", stats, "-o", output)
        assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1, output
    result = run("convert", "-i", source, "-o", stats, "--calib", stats)
    assert result.exit_code == 2 and "output and input are the same" in result.stderr
    assert stats.read_bytes() == before and not list(tmp_path.glob("*.partial*"))


def test_the_same_statistics_are_the_same_bytes_that_others_may_read(tmp_path: Path, source: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(6)]
    for file in files:
        assert run("calibrate", "--simulate", source, "-o", file).exit_code == 0
    assert len({file.read_bytes() for file in files}) == 1
    assert load_stats(files[0]).metadata["model"] == "in.safetensors"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("flags", [(), ("--nvfp4",)])
def test_actscale_takes_no_statistics_of_another_width(tmp_path: Path, source: Path, flags: tuple[str, ...]) -> None:
    quantized = tmp_path / "q.safetensors"
    assert run("convert", "-i", source, "-o", quantized, *flags).exit_code == 0
    for columns, fits in ((64, True), (48, False), (80, False)):
        stats = save_for(tmp_path / "stats.safetensors", {LAYER: inputs(100, columns)})
        result = run("actscale", quantized, "--calib", stats, "-o", tmp_path / "out.safetensors")
        assert (result.exit_code == 0) == fits, result.output
        assert fits or "they are of another model" in result.stderr


@pytest.mark.parametrize("value", ["1e-60", "1e60", f"1{'0' * 400}", "-1", "true"])
def test_an_input_scale_that_float32_does_not_hold_is_refused(tmp_path: Path, source: Path, value: str) -> None:
    scales = tmp_path / "scales.json"
    scales.write_text(f'{{"{LAYER}": {value}}}')
    result = run("convert", "-i", source, "-o", tmp_path / "out.safetensors", "--input_scales", scales)
    assert result.exit_code == 2 and "must be a positive number, is" in result.stderr
    assert len(result.stderr.splitlines()[-1]) < 300


def test_sums_inside_autocast_are_those_outside() -> None:
    model, x = nn.Sequential(nn.Linear(64, 8)), 0.1 * normal(500, 64, seed=1) + 5 * normal(64, seed=2)
    found = []
    for enabled in (False, True):
        with collect(model) as collected, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x)
        found.append(collected.stats()["0"].gram)
    assert torch.equal(*found)


def test_a_collector_runs_once_at_a_time_and_a_layer_needs_a_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with collect(model) as collected:
        with pytest.raises(InputError, match="runs already"), collected:
            pass
        model(normal(3, 8))
    model(normal(3, 8))
    assert collected.tokens == 3
    with pytest.raises(InputError, match="is a single layer"):
        collect(nn.Linear(8, 8))
