"""Corrected biases: where they move, by how much, and that nothing else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrq
from checkpoints import FLAGS, LAYERS, File, convert, load, normal, run, same_bytes, save, tampered, transformer
from lrq.config import Rounding
from lrq.dialects import comfyui
from lrq.formats import read_format
from lrq.repair.bias import mean_shift
from lrq.selection.layer import Layer
from lrq.staging.tiles import Tile, cut
from measured import inputs, save_for

COLUMNS = {"attn.qkv": 32, "mlp.fc": 64}
BIASED = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")


def samples() -> dict[str, torch.Tensor]:
    return {name: inputs(500, COLUMNS[name[9:]], seed=7 * i) for i, name in enumerate(LAYERS)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.safetensors", transformer())


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    return save_for(tmp_path / "stats.safetensors", samples())


def stored_weight(file: File, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    parts = {s: file.tensors[f"{name}.{s}"] for s in comfyui.STORED if f"{name}.{s}" in file.tensors}
    return read_format(file.marked[name], {s: tuple(t.shape) for s, t in parts.items()}).dequantize(parts, shape)


@pytest.mark.parametrize("name", FLAGS)
def test_the_mean_output_stays(tmp_path: Path, source: Path, stats: Path, name: str) -> None:
    """Whatever the format: b' is b - (Ŵ - W)μ in float64, rounded to bfloat16, of the weight as a loader reads it."""
    output = tmp_path / "out.safetensors"
    convert(source, output, *FLAGS[name], "--calib", stats)
    before, after = load(source).tensors, load(output)
    for layer in BIASED:
        w = before[f"{layer}.weight"]
        error = stored_weight(after, layer, tuple(w.shape)).double() - w.double()
        mean = samples()[layer].double().mean(0)
        expected = (before[f"{layer}.bias"].double() - error @ mean).to(torch.bfloat16)
        assert same_bytes(after.tensors[f"{layer}.bias"], expected)
        assert not same_bytes(expected, before[f"{layer}.bias"])
    assert run("verify", output, "--source", source).exit_code == 0


def test_the_report_says_how_far_a_rounded_bias_moved(tmp_path: Path) -> None:
    """A bias of 300 in bfloat16 can't move by less than 1."""
    weights = {"blocks.0.fc.weight": normal(64, 64, seed=1), "blocks.0.fc.bias": torch.full((64,), 300.0).bfloat16()}
    source, output = save(tmp_path / "in", weights), tmp_path / "out"
    stats = save_for(tmp_path / "stats", {"blocks.0.fc": inputs(300, 64)})
    said = convert(source, output, "--preset", "none", "--calib", stats, "--verbose").output
    assert same_bytes(load(output).tensors["blocks.0.fc.bias"], weights["blocks.0.fc.bias"])
    assert "bias moved by 0.0000" in said
    found = json.loads(run("verify", output, "--source", source, "--calib", stats, "--json").output)["layers"][0][
        "inputs"
    ]
    assert found["bias_shift"] == 0 and found["output_error"] == found["output_error_of_codes"]


def test_layers_without_a_bias_are_reported_or_given_one(tmp_path: Path, source: Path, stats: Path) -> None:
    plain = convert(source, tmp_path / "a.safetensors", "--nvfp4", "--calib", stats)
    assert "bias correction: 2 biases" in plain.output
    assert "no bias to correct in blocks.0.mlp.fc, blocks.1.mlp.fc" in plain.output
    assert "blocks.0.mlp.fc.bias" not in load(tmp_path / "a.safetensors").tensors
    added = convert(source, tmp_path / "b.safetensors", "--nvfp4", "--calib", stats, "--add-bias")
    assert "4 biases, 2 of them added" in added.output
    file = load(tmp_path / "b.safetensors")
    w = load(source).tensors["blocks.0.mlp.fc.weight"]
    error = stored_weight(file, "blocks.0.mlp.fc", tuple(w.shape)).double() - w.double()
    expected = (-error @ samples()["blocks.0.mlp.fc"].double().mean(0)).to(torch.bfloat16)
    assert same_bytes(file.tensors["blocks.0.mlp.fc.bias"], expected)
    assert run("verify", tmp_path / "b.safetensors", "--source", source).exit_code == 0


@pytest.mark.parametrize("origin,flags", [("measured", ("--bias_correction", "off")), ("simulated", ())])
def test_no_bias_moves_unless_its_mean_was_measured(tmp_path: Path, source: Path, origin: str, flags) -> None:
    stats = save_for(tmp_path / "stats.safetensors", samples(), origin)
    said = convert(source, tmp_path / "out.safetensors", "--nvfp4", "--calib", stats, *flags)
    for layer in BIASED:
        assert same_bytes(
            load(tmp_path / "out.safetensors").tensors[f"{layer}.bias"], load(source).tensors[f"{layer}.bias"]
        )
    assert ("simulated" in said.output) == (origin == "simulated")


def test_names_may_differ_by_a_prefix(tmp_path: Path, source: Path, stats: Path) -> None:
    other = save_for(tmp_path / "wrapped.safetensors", {f"module.{name}": x for name, x in samples().items()})
    said = convert(source, tmp_path / "a.safetensors", "--calib", other)
    assert "matched without module. (4 layers)" in said.output
    convert(source, tmp_path / "b.safetensors", "--calib", stats)
    a, b = (load(tmp_path / f"{name}.safetensors").tensors for name in "ab")
    assert all(same_bytes(a[name], b[name]) for name in b)


@pytest.mark.parametrize("name", FLAGS)
def test_a_layer_in_tiles_has_its_bias_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tensors = {"fc.weight": normal(512, 64, seed=1, dtype=torch.bfloat16), "fc.bias": normal(512, seed=2)}
    source = save(tmp_path / "in.safetensors", tensors)
    stats = save_for(tmp_path / "s.safetensors", {"fc": inputs(50, 64)}, gram_limit=1, rank=8)
    convert(source, tmp_path / "whole.safetensors", *FLAGS[name], "--calib", stats)
    cuts: list[int] = []

    def in_parts(layer: Layer, rounding: Rounding, limit: int | None, on_gpu: bool, plain: bool) -> tuple[Tile, ...]:
        tiles = tuple(cut(layer, rounding, 1))
        cuts.append(len(tiles))
        return tiles

    monkeypatch.setattr("lrq.staging.memory._tiles", in_parts)
    convert(source, tmp_path / "parts.safetensors", *FLAGS[name], "--calib", stats)
    assert cuts and cuts[0] > 1
    whole, parts = (load(tmp_path / f"{n}.safetensors").tensors for n in ("whole", "parts"))
    assert all(same_bytes(parts[key], tensor) for key, tensor in whole.items())
    assert not same_bytes(whole["fc.bias"], tensors["fc.bias"])


def test_a_plan_file_and_shards_keep_the_correction(tmp_path: Path, source: Path, stats: Path) -> None:
    """Biases and input scales are in the header's plan, whoever reads it."""
    flags = ("--nvfp4", "--simple", "--calib", stats, "--add-bias", "--actcal")
    planned = run("plan", source, *flags, "--json")
    assert planned.exit_code == 0
    (tmp_path / "plan.json").write_text(planned.stdout)
    assert run("convert", "-i", source, "-o", tmp_path / "a.safetensors", *flags).exit_code == 0
    by_plan = run("convert", "-i", source, "-o", tmp_path / "b.safetensors", "--plan", tmp_path / "plan.json")
    assert by_plan.exit_code == 0, by_plan.output
    a, b = (load(tmp_path / f"{n}.safetensors").tensors for n in "ab")
    assert all(same_bytes(a[name], b[name]) for name in a) and a.keys() == b.keys()
    assert (tmp_path / "a.safetensors").stat().st_size == json.loads(planned.stdout)["output_bytes"]
    run("convert", "-i", source, "-o", tmp_path / "c.safetensors", *flags, "--shard_size", "8kB")
    shards = {k: t for path in tmp_path.glob("c-*-of-*.safetensors") for k, t in load(path).tensors.items()}
    assert a.keys() == shards.keys() and all(same_bytes(a[name], shards[name]) for name in a)


def test_the_shift_of_a_row_does_not_depend_on_the_others() -> None:
    w, mean = normal(700, 96, dtype=torch.float64), normal(96, seed=1, dtype=torch.float64)
    whole = mean_shift(w, w.float(), mean)
    assert torch.equal(mean_shift(w[128:300], w[128:300].float(), mean), whole[128:300])


def test_other_statistics_do_not_resume(tmp_path: Path, source: Path, stats: Path) -> None:
    """The run is killed while it writes; with the same file it goes on, with another of the same name it is refused."""
    output = tmp_path / "out.safetensors"
    script = (
        "import os, signal, sys, lrq\n"
        "lrq.quantize(*sys.argv[1:3], simple=True, calib=sys.argv[3],"
        " on_layer=lambda layer: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", script, source, output, stats], env=os.environ, timeout=120)
    assert killed.returncode == -signal.SIGKILL and not output.exists()
    right = stats.read_bytes()
    save_for(stats, {name: x + 1 for name, x in samples().items()})
    with pytest.raises(lrq.InputError, match="the file of statistics was"):
        lrq.quantize(source, output, simple=True, calib=str(stats))
    stats.write_bytes(right)
    lrq.quantize(source, output, simple=True, calib=str(stats))
    lrq.quantize(source, tmp_path / "once.safetensors", simple=True, calib=str(stats))
    assert output.read_bytes() == (tmp_path / "once.safetensors").read_bytes()


def _forget(file: File) -> None:
    del file.tensors["blocks.0.attn.qkv.bias"]


def _spoil(file: File) -> None:
    file.tensors["blocks.0.attn.qkv.bias"][0] = float("nan")


def _widen(file: File) -> None:
    file.tensors["blocks.0.attn.qkv.bias"] = file.tensors["blocks.0.attn.qkv.bias"].float()


def _other(file: File) -> None:
    file.tensors["blocks.0.norm1.weight"][0] += 1


@pytest.mark.parametrize(
    "change,word", [(_forget, "missing"), (_spoil, "not finite"), (_widen, "must be BF16"), (_other, "bytes differ")]
)
def test_verify_sees_biases_that_are_wrong(tmp_path: Path, source: Path, stats: Path, change, word: str) -> None:
    convert(source, tmp_path / "out.safetensors", "--nvfp4", "--calib", stats)
    result = run("verify", tampered(tmp_path / "out.safetensors", change), "--source", source)
    assert result.exit_code == 1 and word in result.output


def test_verify_does_not_need_the_statistics_and_refuses_unrecorded_biases(
    tmp_path: Path, source: Path, stats: Path
) -> None:
    convert(source, tmp_path / "out.safetensors", "--nvfp4", "--calib", stats)
    stats.unlink()
    assert run("verify", tmp_path / "out.safetensors", "--source", source).exit_code == 0
    convert(source, tmp_path / "plain.safetensors", "--nvfp4")

    def move(file: File) -> None:
        file.tensors["blocks.0.attn.qkv.bias"] += 1

    result = run("verify", tampered(tmp_path / "plain.safetensors", move), "--source", source)
    assert result.exit_code == 1 and "blocks.0.attn.qkv.bias: its bytes differ" in result.output


def test_the_report_says_what_the_statistics_predict(tmp_path: Path, source: Path, stats: Path) -> None:
    """The prediction from E[xx'] is the error of the outputs of those very inputs."""
    output = tmp_path / "out.safetensors"
    summary = lrq.quantize(source, output, nvfp4=True, simple=True, calib=str(stats))
    result = next(layer for layer in summary.layers if layer.name == BIASED[0])
    w = load(source).tensors[f"{BIASED[0]}.weight"].double()
    e, x = stored_weight(load(output), BIASED[0], tuple(w.shape)).double() - w, samples()[BIASED[0]].double()
    noise = x @ e.T
    signal = (x @ w.T).square().sum()
    assert result.output is not None
    assert result.output.before == pytest.approx((noise.square().sum() / signal).sqrt().item(), rel=1e-4)
    after = (noise - noise.mean(0)).square().sum() / signal
    assert result.output.after == pytest.approx(after.sqrt().item(), rel=1e-4)
    said = convert(source, output, "--nvfp4", "--calib", stats, "--verbose")
    assert f"output error by its statistics {result.output.before:.4f} -> {result.output.after:.4f}" in said.output
