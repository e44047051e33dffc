"""Folders of text models: what of them is run, and what is refused before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_models
from checkpoints import run
from lrq.calibration.hf import first_line
from lrq.calibration.stats import StatsFile, load_stats

QUERY = "encoder.layer.0.attention.self.query.weight"


def calibrated(folder: Path, *flags: object) -> StatsFile:
    path = folder.with_name("stats.safetensors")
    result = run("calibrate", "--hf", folder, "--texts", folder.with_name("texts.txt"), "-o", path, *flags)
    assert result.exit_code == 0, result.output
    return load_stats(path)


def refused(folder: Path) -> str:
    path = folder.with_name("stats.safetensors")
    result = run("calibrate", "--hf", folder, "--texts", folder.with_name("texts.txt"), "-o", path)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and line.isprintable() and not path.exists(), line
    return line


def _renamed(folder: Path) -> None:
    hf_models.replace_weights(folder, {f"zz.{name}": t for name, t in hf_models.weights(folder).items()})


def _one_gone(folder: Path) -> None:
    hf_models.replace_weights(folder, {name: t for name, t in hf_models.weights(folder).items() if name != QUERY})


@pytest.mark.parametrize(
    "change,missing",
    [
        (_renamed, "the checkpoint has no embeddings.LayerNorm.bias, embeddings.LayerNorm.weight, "),
        (_one_gone, f"the checkpoint has no {QUERY}, which"),
        (lambda folder: hf_models.configure(folder, num_hidden_layers=2), "has no encoder.layer.1.attention.output."),
    ],
)
def test_random_weights_are_not_measured(tmp_path: Path, change: Callable[[Path], None], missing: str) -> None:
    folder = hf_models.make(tmp_path / "model", "bert")
    change(folder)
    assert missing in refused(folder)


def test_a_head_may_be_missing(tmp_path: Path) -> None:
    folder = hf_models.make(tmp_path / "model", "bert")
    whole = hf_models.weights(folder)
    hf_models.replace_weights(folder, {name: tensor for name, tensor in whole.items() if "pooler" not in name})
    assert set(calibrated(folder)) == {
        name.removesuffix(".weight") for name, t in whole.items() if t.dim() == 2 and name.startswith("encoder")
    }


@pytest.mark.parametrize(
    "name,prefix,layers",
    [("t5", "encoder.", 6), ("umt5", "encoder.", 7), ("bart", "encoder.", 6), ("clip", "text_model.", 6)],
)
def test_the_part_that_texts_can_run_is_run(tmp_path: Path, name: str, prefix: str, layers: int) -> None:
    folder = hf_models.make(tmp_path / "model", name)
    stats, shapes = calibrated(folder), {key: t.shape for key, t in hf_models.weights(folder).items()}
    assert all(layer.startswith(prefix) for layer in stats) and len(stats) == layers
    assert all(shapes[f"{layer}.weight"][1] == stats.columns(layer) for layer in stats)
    assert {stats.brief(layer).count for layer in stats} == {hf_models.TOKENS}


def test_texts_without_a_token_to_pad_with_run_alone(tmp_path: Path) -> None:
    together = calibrated(hf_models.make(tmp_path / "model", "bert"))
    one = together["encoder.layer.0.output.dense"]
    alone = calibrated(hf_models.make(tmp_path / "other", "bert", {"unk_token": "[UNK]"}))[
        "encoder.layer.0.output.dense"
    ]
    assert alone.count == one.count == hf_models.TOKENS
    torch.testing.assert_close(alone.mean, one.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_texts_begin_at_the_first_place_whatever_side_is_padded(tmp_path: Path, name: str) -> None:
    right = calibrated(hf_models.make(tmp_path / "one" / "model", name))
    left = hf_models.make(tmp_path / "other" / "model", name)
    file = left / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    found = calibrated(left)
    for layer in right:
        assert torch.equal(found[layer].mean, right[layer].mean)


def test_a_limit_of_minus_one_is_none(tmp_path: Path) -> None:
    folder = hf_models.make(tmp_path / "model", "t5")
    hf_models.configure(folder, max_position_embeddings=-1)
    stats = calibrated(folder)
    assert {stats.brief(layer).count for layer in stats} == {hf_models.TOKENS}


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "vocabulary": (
        lambda folder: hf_models.make(folder, "bert", vocab_size=3),
        "gives token 4, but the model has embeddings of 3",
    ),
    "width": (
        lambda folder: hf_models.configure(folder, hidden_size=48),
        "embeddings.LayerNorm.bias is [32], config.json says [48]",
    ),
    "architectures": (lambda folder: hf_models.configure(folder, architectures=5), "no text model that transformers"),
    "architecture": (lambda folder: hf_models.configure(folder, architectures=[5]), "no text model that transformers"),
    "heads": (lambda folder: hf_models.configure(folder, num_attention_heads=0), "no text model that transformers"),
    "dtype": (lambda folder: hf_models.configure(folder, dtype="nope"), "has no attribute 'nope'"),
    "activation": (lambda folder: hf_models.configure(folder, hidden_act="nope"), "KeyError: 'nope'"),
    "places": (lambda folder: hf_models.configure(folder, max_position_embeddings="x"), "'max_position_embeddings'"),
    "tokenizer config": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "no text model that"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(json.dumps({})), "no text model that"),
    "no tokenizer": (_no_tokenizer, "has no tokenizer with a vocabulary"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_library_raises_is_one_line(tmp_path: Path, what: str) -> None:
    folder = hf_models.make(tmp_path / "model", "bert")
    change, word = BAD[what]
    change(folder)
    assert word in refused(folder)


def test_a_model_that_fails_is_one_line(tmp_path: Path) -> None:
    folder = hf_models.make(tmp_path / "model", "qwen3_moe", num_experts_per_tok=5)
    assert "the model can't be run: selected index k out of range" in refused(folder)


def test_the_first_line_says_what_is_wrong() -> None:
    assert first_line("\n\x1b[31mBad\x1b[0m thing\nmore\n") == "Bad thing"
    assert first_line("Validation error for field 'x':\n   TypeError: no int\n") == (
        "Validation error for field 'x': TypeError: no int"
    )
    assert first_line("") == ""
