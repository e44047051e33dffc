"""Conversions by statistics, end to end: what is better, what is the same, what is said and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrq
from checkpoints import FLAGS, LAYERS, File, load, normal, run, same_bytes, save, tampered, transformer
from lrq.calibration.stats import save_stats
from lrq.config import Rounding
from lrq.dialects import comfyui
from lrq.formats import read_format
from lrq.selection.layer import Layer
from lrq.staging.tiles import Tile, cut
from measured import inputs, save_for, statistics

COLUMNS = {"attn.qkv": 32, "mlp.fc": 64}


def samples(count: int = 500) -> dict[str, torch.Tensor]:
    return {name: inputs(600, COLUMNS[name[9:]], seed=7 * i)[:count] for i, name in enumerate(LAYERS)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.safetensors", transformer())


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    return save_for(tmp_path / "stats.safetensors", samples())


def learned(source: Path, output: Path, *flags: object) -> str:
    """Convert, which must succeed, and its words."""
    result = run("convert", "-i", source, "-o", output, *flags)
    assert result.exit_code == 0, result.output
    return result.output


def stored_weight(file: File, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    parts = {s: file.tensors[f"{name}.{s}"] for s in comfyui.STORED if f"{name}.{s}" in file.tensors}
    return read_format(file.marked[name], {s: tuple(t.shape) for s, t in parts.items()}).dequantize(parts, shape)


def error_of_outputs(source: Path, output: Path) -> float:
    """Of inputs that the statistics have not seen, of all layers together."""
    before, after, total = load(source).tensors, load(output), 0.0
    for name, x in samples(600).items():
        w, bias = before[f"{name}.weight"].double(), before.get(f"{name}.bias", torch.zeros(1)).double()
        wanted = x[500:].double() @ w.mT + bias
        stored = stored_weight(after, name, tuple(w.shape)).double()
        found = x[500:].double() @ stored.mT + after.tensors.get(f"{name}.bias", torch.zeros(1)).double()
        total += ((found - wanted).square().sum() / wanted.square().sum()).item()
    return total**0.5


@pytest.mark.parametrize("name", FLAGS)
def test_statistics_lower_the_error_of_outputs(tmp_path: Path, source: Path, stats: Path, name: str) -> None:
    plain, output = tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    learned(source, plain, *FLAGS[name])
    said = learned(source, output, *FLAGS[name], "--calib", stats, "--verbose")
    assert said.count("all columns rounded") == len(LAYERS)
    assert error_of_outputs(source, output) < 0.7 * error_of_outputs(source, plain)
    verified = run("verify", output, "--source", source)
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "discrete"),
        ("--optimizer", "gptq", "--bias_correction", "off"),
        ("--scale_search", "off"),
        ("--simple",),
        ("--simple", "--scale_search", "off"),
        ("--scale_rounds", "2"),
        ("--add-bias",),
    ],
    ids=" ".join,
)
def test_verify_knows_every_way(tmp_path: Path, source: Path, stats: Path, flags: tuple[str, ...]) -> None:
    output, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    learned(source, output, "--nvfp4", "--calib", stats, *flags)
    learned(source, plain, "--nvfp4", "--simple", "--scale_search", "off")
    verified = run("verify", output, "--source", source)
    assert verified.exit_code == 0, verified.output
    assert error_of_outputs(source, output) < error_of_outputs(source, plain)


def test_verify_finds_what_was_not_written(tmp_path: Path, source: Path, stats: Path) -> None:
    output = tmp_path / "out.safetensors"
    learned(source, output, "--nvfp4", "--calib", stats)

    def of_the_matrix(file: File) -> None:
        file.tensors[f"{LAYERS[0]}.weight_scale_2"] *= 1.01

    def of_all_codes(file: File) -> None:
        file.tensors[f"{LAYERS[0]}.weight"][:48] = file.tensors[f"{LAYERS[0]}.weight"][:48].flip(0)

    for change, words in ((of_the_matrix, "weight_scale_2 is not what"), (of_all_codes, "times that of")):
        result = run("verify", tampered(output, change), "--source", source)
        assert result.exit_code == 1 and words in result.output

    learned(source, output, "--nvfp4", "--calib", stats, "--simple", "--scale_search", "off")

    def of_a_block(file: File) -> None:
        file.tensors[f"{LAYERS[0]}.weight_scale"].view(torch.uint8)[0, 0] ^= 1

    result = run("verify", tampered(output, of_a_block), "--source", source)
    assert result.exit_code == 1 and "weight_scale is not what" in result.output


def test_layers_without_statistics_are_as_without_calib(tmp_path: Path, source: Path) -> None:
    some = save_for(tmp_path / "some.safetensors", {name: x for name, x in samples().items() if name != LAYERS[1]})
    learned(source, tmp_path / "plain.safetensors", "--nvfp4")
    plain = load(tmp_path / "plain.safetensors").tensors
    for optimizer in ((), ("--optimizer", "gptq")):
        said = learned(source, tmp_path / "out.safetensors", "--nvfp4", "--calib", some, "--verbose", *optimizer)
        assert f"statistics: none of {LAYERS[1]}" in said and said.count("all columns rounded") == 3
        out = load(tmp_path / "out.safetensors").tensors
        same = [name for name in LAYERS if same_bytes(out[f"{name}.weight"], plain[f"{name}.weight"])]
        assert same == [LAYERS[1]]
        assert run("verify", tmp_path / "out.safetensors", "--source", source).exit_code == 0


def test_each_layer_of_two_models_has_its_own_statistics(tmp_path: Path) -> None:
    """The float32 of a text encoder comes first in a file, its model last among those that are decided on."""
    weights = {
        "model.diffusion_model.blocks.0.attn.weight": normal(128, 64, seed=1).bfloat16(),
        "text_encoders.x.blocks.0.q.weight": normal(128, 64, seed=2),
    }
    stats = {name.removesuffix(".weight"): inputs(300, 64, seed=i) for i, name in enumerate(weights)}
    flags = ("--nvfp4", "--preset", "none", "--num_iter", 20, "--calib", save_for(tmp_path / "stats", stats))
    learned(save(tmp_path / "both", weights), tmp_path / "out", *flags)
    both = load(tmp_path / "out").tensors
    for name, weight in weights.items():
        learned(save(tmp_path / "one", {name: weight}), tmp_path / "alone", *flags, "--restart")
        for tensor, value in load(tmp_path / "alone").tensors.items():
            assert same_bytes(value, both[tensor]), tensor


def test_diagonals_alone_leave_the_choice_to_the_discrete_solver(tmp_path: Path, source: Path) -> None:
    stats = save_for(tmp_path / "s.safetensors", samples(), "simulated", gram_limit=1, rank=0)
    said = learned(source, tmp_path / "out.safetensors", "--nvfp4", "--calib", stats, "--verbose")
    assert "all columns rounded" not in said and "mean and E[x²]" in said
    learned(source, tmp_path / "plain.safetensors", "--nvfp4", "--simple")
    outputs = [tmp_path / f"{name}.safetensors" for name in ("out", "plain")]
    assert error_of_outputs(source, outputs[0]) < error_of_outputs(source, outputs[1])


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("flags", [(), ("--simple",)], ids=["learned", "simple"])
def test_parts_of_a_layer_have_its_bytes(tmp_path: Path, monkeypatch, name: str, flags: tuple[str, ...]) -> None:
    """Rows of a matrix, experts of a bank, shards of the file."""
    bank, fc = "blocks.0.experts", "blocks.0.fc"
    tensors = {f"{fc}.weight": normal(640, 64, seed=1), f"{fc}.bias": normal(640), f"{bank}.weight": normal(5, 48, 64)}
    source = save(tmp_path / "in.safetensors", tensors)
    stats = save_for(tmp_path / "s.safetensors", {fc: inputs(50, 64), bank: inputs(70, 64, seed=9)})
    flags = (*FLAGS[name], *flags, "--calib", stats)
    learned(source, tmp_path / "whole.safetensors", *flags)
    cuts: list[int] = []

    def in_parts(layer: Layer, rounding: Rounding, limit: int | None, on_gpu: bool, plain: bool) -> tuple[Tile, ...]:
        tiles = tuple(cut(layer, rounding, 1))
        cuts.append(len(tiles))
        return tiles

    monkeypatch.setattr("lrq.staging.memory._tiles", in_parts)
    learned(source, tmp_path / "parts.safetensors", *flags, "--low_memory", "--shard_size", "30kB")
    assert max(cuts) >= 5 or "convrot" in name  # banks are not rotated
    whole = load(tmp_path / "whole.safetensors").tensors
    parts = {key: t for path in tmp_path.glob("parts-*-of-*.safetensors") for key, t in load(path).tensors.items()}
    assert parts.keys() == whole.keys() and all(same_bytes(parts[key], tensor) for key, tensor in whole.items())
    assert run("verify", tmp_path / "whole.safetensors", "--source", source).exit_code == 0


def test_a_plan_file_gives_the_same_bytes(tmp_path: Path, source: Path, stats: Path) -> None:
    flags = ("--nvfp4", "--calib", stats, "--optimizer", "gptq")
    planned = run("plan", source, *flags, "--json")
    assert planned.exit_code == 0, planned.output
    (tmp_path / "plan.json").write_text(planned.stdout)
    learned(source, tmp_path / "a.safetensors", *flags)
    learned(source, tmp_path / "b.safetensors", "--plan", tmp_path / "plan.json")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, source: Path, stats: Path) -> None:
    script = (
        "import os, signal, sys, lrq\n"
        "lrq.quantize(*sys.argv[1:3], nvfp4=True, calib=sys.argv[3],"
        " on_layer=lambda layer: os.kill(os.getpid(), signal.SIGKILL))"
    )
    output = tmp_path / "out.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    died = subprocess.run([sys.executable, "-c", script, source, output, stats], check=False, env=environment)
    assert died.returncode == -signal.SIGKILL and not output.exists()
    learned(source, output, "--nvfp4", "--calib", stats)
    learned(source, tmp_path / "at-once.safetensors", "--nvfp4", "--calib", stats)
    assert output.read_bytes() == (tmp_path / "at-once.safetensors").read_bytes()


def test_the_report_says_by_layer_what_statistics_did(tmp_path: Path, source: Path, stats: Path) -> None:
    output = tmp_path / "out.safetensors"
    summary = lrq.quantize(source, output, nvfp4=True, calib=str(stats))
    by_name = {layer.name: layer for layer in summary.layers}
    shown = run("verify", output, "--source", source, "--calib", stats, "--json")
    assert shown.exit_code == 0, shown.output
    for layer in json.loads(shown.stdout)["layers"]:
        said, error = layer["inputs"], by_name[layer["name"]].output
        assert said["statistics"] == by_name[layer["name"]].statistics == "500 tokens, E[xx'] whole"
        assert said["output_error_of_nearest"] == pytest.approx(error.of_nearest, rel=1e-5)
        assert said["output_error_of_codes"] == pytest.approx(error.before, rel=1e-5)
        assert said["output_error"] <= said["output_error_of_codes"] < said["output_error_of_nearest"]
        assert ("bias_shift" in said) == (f"{layer['name']}.bias" in load(source).tensors)
    x, w = samples()[LAYERS[0]].double(), load(source).tensors[f"{LAYERS[0]}.weight"]
    noise = x @ (stored_weight(load(output), LAYERS[0], tuple(w.shape)).double() - w.double()).mT
    wanted = (noise.square().sum() / (x @ w.double().mT).square().sum()).sqrt().item()
    assert by_name[LAYERS[0]].output.before == pytest.approx(wanted, rel=1e-4)
    table = run("verify", output, "--source", source, "--calib", stats).output
    assert "bias shift" in table and f"{by_name[LAYERS[0]].output.after:.4f}" in table
    said = learned(source, output, "--nvfp4", "--calib", stats, "--verbose")
    assert f"of round-to-nearest {by_name[LAYERS[0]].output.of_nearest:.4f}" in said
    assert run("verify", output, "--calib", stats).output.startswith("error: --calib: predicts errors against a source")
    other = save_for(tmp_path / "other.safetensors", {"another.layer": inputs(9, 32)})
    assert "of another model" in run("verify", output, "--source", source, "--calib", other).output


def test_statistics_that_none_has_are_refused(tmp_path: Path, source: Path, stats: Path) -> None:
    refused = run("convert", "-i", source, "--nvfp4", "--optimizer", "gptq")
    assert refused.exit_code == 2 and "--optimizer gptq: needs the statistics of --calib" in refused.output
    bad = statistics(inputs(99, 32))
    bad = replace(bad, gram=bad.gram - 9 * torch.eye(32))
    save_stats(tmp_path / "bad.safetensors", {LAYERS[0]: bad}, "measured")
    refused = run("convert", "-i", source, "--nvfp4", "--calib", tmp_path / "bad.safetensors")
    assert refused.exit_code == 2 and refused.output.count("\n") == 1
    assert f"the statistics of layer {LAYERS[0]} are of no inputs: E[xx'] has a negative eigenvalue" in refused.output
    tensors = load_file(stats)
    tensors[f"{LAYERS[0]}.gram"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors", load(stats).metadata)
    refused = run("convert", "-i", source, "--nvfp4", "--calib", tmp_path / "nan.safetensors")
    assert refused.exit_code == 2 and f"layer {LAYERS[0]}: gram is NaN or infinite" in refused.output
    assert not list(tmp_path.glob("in-nvfp4*"))
