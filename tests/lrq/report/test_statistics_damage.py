"""With the statistics a file was made with, verify tells what they made from what they did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import normal, run, save
from lrq.checkpoint.reader import Reader
from measured import inputs, save_for

LAYERS = {"blocks.0.fc": inputs(400, 64, seed=1), "blocks.1.fc": inputs(400, 64, seed=2)}
FLAGS = {"fp8": (), "nvfp4": ("--nvfp4",), "int8-row": ("--int8", "--scaling_mode", "row")}


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, Path]:
    tensors = {f"{layer}.weight": normal(96, 64, seed=i) for i, layer in enumerate(LAYERS)}
    source = save(tmp_path / "in.safetensors", tensors | {"blocks.0.fc.bias": normal(96, seed=9).bfloat16()})
    stats, output = save_for(tmp_path / "stats.safetensors", LAYERS), tmp_path / "out.safetensors"
    flags = (*FLAGS[request.param], "--calib", stats, "--actcal", "--add_bias", "--preset", "none")
    result = run("convert", "-i", source, "-o", output, *flags)
    assert result.exit_code == 0, result.output
    return source, stats, output


def verified(source: Path, stats: Path, output: Path) -> tuple[int, str]:
    result = run("verify", output, "--source", source, "--calib", stats)
    return result.exit_code, result.output


def change(output: Path, name: str, how) -> None:
    with Reader(output) as reader:
        entry, tensor = reader.entries[name], reader.read(name)
        start = reader.header.data_start + entry.begin
    data = how(tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    with open(output, "r+b") as file:
        file.seek(start)
        file.write(data)


@pytest.mark.parametrize("made", FLAGS, indirect=True)
def test_what_was_written_is_ok(made: tuple[Path, Path, Path]) -> None:
    code, said = verified(*made)
    assert code == 0, said


@pytest.mark.parametrize("made", FLAGS, indirect=True)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("how", [torch.neg, lambda bias: bias + 0.05])
def test_another_bias_is_told(made: tuple[Path, Path, Path], layer: str, how) -> None:
    change(made[2], f"{layer}.bias", how)
    code, said = verified(*made)
    assert code == 1 and "its bias is not what the statistics give" in said


@pytest.mark.parametrize("made", ["fp8", "nvfp4"], indirect=True)
def test_another_input_scale_is_told(made: tuple[Path, Path, Path]) -> None:
    change(made[2], "blocks.0.fc.input_scale", lambda scale: scale * 1.01)
    code, said = verified(*made)
    assert code == 1 and "input_scale is " in said and "the statistics give " in said


@pytest.mark.parametrize("made", FLAGS, indirect=True)
def test_codes_that_are_worse_for_the_outputs_are_told(made: tuple[Path, Path, Path]) -> None:
    change(made[2], "blocks.1.fc.weight", lambda codes: codes.flip(0))
    code, said = verified(*made)
    assert code == 1, said


@pytest.mark.parametrize("made", ["nvfp4"], indirect=True)
def test_other_statistics_only_predict(made: tuple[Path, Path, Path]) -> None:
    source, stats, output = made
    save_for(stats, {layer: 2 * x for layer, x in LAYERS.items()})
    change(output, "blocks.0.fc.bias", torch.neg)
    code, said = verified(source, stats, output)
    assert code == 0, said
