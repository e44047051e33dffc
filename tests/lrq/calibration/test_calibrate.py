"""``lrq calibrate``: a text model end to end, norms alone, and the embeddings of a real model after bias correction."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lrq
import real_models
from checkpoints import normal, run, save
from lrq.calibration.simulate import feeds, from_norm
from lrq.calibration.stats import load_stats
from measured import statistics

TEXTS = 256
NEAREST = {"scale_search": False}
LEAST_SQUARES = {"coherence": 0.0}
"""Best scales by |E|² alone."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that are not among those of the evaluation."""
    evaluated = set(real_models.english_sentences(512))
    others = [text for text in real_models.english_sentences(1024) if text not in evaluated]
    assert len(others) >= TEXTS
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(others[:TEXTS]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stats(texts: Path) -> Path:
    path = texts.with_name("stats.safetensors")
    result = run("calibrate", "--hf", real_models.minilm_folder(), "--texts", texts, "-o", path)
    assert result.exit_code == 0 and "inputs of 37 layers" in result.output, result.output
    return path


@pytest.fixture(scope="module")
def encoder():
    model, original = real_models.MiniLM(real_models.english_sentences(512)), real_models.load_minilm()
    return model, model.embed(original), original


@pytest.mark.parametrize("settings,falls", [(NEAREST, 0.18), (LEAST_SQUARES, 0.20), ({}, 0.12)])
def test_bias_correction_pays_on_a_real_model(
    stats: Path, encoder, minilm: Path, tmp_path: Path, settings, falls
) -> None:
    """1 - cosine of sentences that the statistics have not seen."""
    model, reference, original = encoder
    distances = []
    for extra in ({}, {"calib": str(stats)}):
        output = tmp_path / "out.safetensors"
        lrq.quantize(minilm, output, nvfp4=True, simple=True, **settings, **extra)
        biases = {name: tensor for name, tensor in load_file(output).items() if name.endswith(".bias")}
        distances.append(model.distance(reference, real_models.load_converted(output, original) | biases))
    assert distances[1] <= (1 - falls) * distances[0], distances


def test_statistics_of_a_text_model(stats: Path, texts: Path) -> None:
    found = load_stats(stats)
    assert found.measured and int(found.metadata["tokens"]) > 3000
    shapes = {name: tuple(t.shape) for name, t in real_models.load_minilm().items()}
    assert all(shapes[f"{name}.weight"][1] == found.columns(name) for name in found)
    assert {found.brief(name).count for name in found if "encoder" in name} == {int(found.metadata["tokens"])}


def test_max_tokens_is_a_bound(texts: Path, tmp_path: Path) -> None:
    options = ("--texts", texts, "-o", tmp_path / "s.safetensors", "--max_tokens", 100)
    assert run("calibrate", "--hf", real_models.minilm_folder(), *options).exit_code == 0
    assert load_stats(tmp_path / "s.safetensors").brief("encoder.layer.0.output.dense").count == 100


def test_norms_feed_the_layers_behind_them(minilm: Path, tmp_path: Path) -> None:
    result = run("calibrate", "--simulate", minilm, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 0 and "inputs of 30 layers, simulated" in result.output, result.output
    found, state = load_stats(tmp_path / "s.safetensors"), real_models.load_minilm()
    assert not found.measured
    one, norm = found["encoder.layer.1.attention.self.query"], "encoder.layer.0.output.LayerNorm"
    assert torch.equal(one.mean, state[f"{norm}.bias"].double())
    torch.testing.assert_close(one.second - one.mean.square(), state[f"{norm}.weight"].double().square())
    converted = run("convert", "-i", minilm, "-o", tmp_path / "o.safetensors", "--simple", "--calib", found.path)
    assert "no bias is corrected: the statistics are simulated" in converted.output


def test_simulated_statistics_are_those_of_normal_numbers() -> None:
    gain, bias = normal(40), normal(40, seed=1)
    one, drawn = from_norm(gain, bias), statistics(normal(20000, 40, seed=2) * gain + bias)
    torch.testing.assert_close(one.mean, drawn.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(one.second, drawn.second, rtol=0.08, atol=0.05)
    for percent in (50.0, 90.0, 99.0):
        assert one.percentile(percent) == pytest.approx(drawn.percentile(percent), rel=0.13)


def test_names_that_mean_something_else_feed_nothing() -> None:
    llama = ["model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.up_proj.weight"]
    assert feeds(llama) == {"model.layers.0.mlp.up_proj": "model.layers.0.post_attention_layernorm"}
    assert feeds([*llama, "model.layers.0.pre_feedforward_layernorm.weight"]) == {}


@pytest.mark.parametrize(
    "flags,word",
    [
        ((), "needs either --hf DIR with --texts FILE, or --simulate IN"),
        (("--hf", "D"), "--hf: needs --texts FILE as well"),
        (("--hf", "D", "--simulate", "S"), "needs either"),
        (("--simulate", "S", "--max-tokens", "3"), "--simulate: runs no text"),
        (("--simulate", "S"), "no layer stands behind a norm"),
        (("--simulate", "S", "--actcal-lora", "S"), "holds no LoRA for a layer"),
        (("--hf", "D", "--texts", "T", "--calib-samples", "9"), "--calib_samples: is of --simulate"),
        (("--hf", "D", "--texts", "absent.txt"), "can't be read"),
        (("--hf", "D", "--texts", "E"), "holds no text"),
        (("--hf", "D", "--texts", "T"), "no text model that transformers loads"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, flags: tuple[str, ...], word: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    source = save(folder / "model.safetensors", {"fc.weight": normal(8, 8)})
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "texts.txt").write_text("a text\n")
    names = {"D": folder, "S": source, "E": tmp_path / "empty.txt", "T": tmp_path / "texts.txt"}
    result = run("calibrate", *(names.get(flag, flag) for flag in flags), "-o", tmp_path / "out.safetensors")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and word in line, line
    assert not (tmp_path / "out.safetensors").exists()


def test_without_transformers_there_is_one_line(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object) -> object:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = run("calibrate", "--hf", real_models.minilm_folder(), "--texts", texts, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 2 and "--hf: needs transformers: pip install" in result.stderr
